from ist.report.compare import main
from ist.training.command_line import run_command

run_command(main)
