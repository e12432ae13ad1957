"""The signals that ask a run to end."""

import signal

# SIGHUP comes when the terminal is gone, SIGUSR1 from Slurm ahead of the time limit.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# Of these, a second one ends the run at once.
IMPATIENT_SIGNALS = (signal.SIGINT, signal.SIGTERM)
