"""python -m launch.dashboard."""

from launch.command.main import run_main
from launch.dashboard.command import main

if __name__ == "__main__":
    run_main("dashboard", main)
