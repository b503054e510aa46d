"""python -m launch.doctor."""

from launch.command.main import run_main
from launch.doctor.command import main

if __name__ == "__main__":
    run_main("doctor", main)
