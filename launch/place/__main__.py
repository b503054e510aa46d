"""python -m launch.place."""

from launch.command.main import run_main
from launch.place.command import main

if __name__ == "__main__":
    run_main("place", main)
