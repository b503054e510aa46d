"""Entry points: compose the config, validate it, spawn processes, call train and model."""

import signal
import sys

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # python -m launch.X: until X takes over, nothing is at stake, and Ctrl-C in its imports needs
    # no traceback. launch/command/interrupt.py and train/rank/stop.py say what it does from then
    # on.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
