from ist.training.packages import require_packages

require_packages()

from ist.training.command_line import quiet_known_warnings, run_command

quiet_known_warnings()

from ist.benchmark.command import main

run_command(main)
