"""python -m launch.report."""

from launch.command.main import run_main
from launch.report.command import main

if __name__ == "__main__":
    run_main("report", main)
