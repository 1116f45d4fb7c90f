from ist.analyze.command import main
from ist.training.command_line import run_command

run_command(main)
