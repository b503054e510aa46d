"""python -m launch: the commands there are."""

from launch.command.help import overview

if __name__ == "__main__":
    print(overview())
