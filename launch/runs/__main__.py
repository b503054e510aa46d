"""python -m launch.runs."""

from launch.command.main import run_main
from launch.runs.command import main

if __name__ == "__main__":
    run_main("runs", main)
