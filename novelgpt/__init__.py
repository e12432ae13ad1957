"""What the pipelines share: settings, text, models, training and scoring. It imports none of them.

Importing it switches telemetry off, and under `python -m` lets Ctrl-C end the process without a traceback until `main`
begins, and gives ranks what libraries read when they are imported; so each room imports it before anything else.
"""

import os
import sys

from novelgpt.settings.external_ranks import start_rank
from novelgpt.settings.signals import begin_command
from novelgpt.settings.third_party import disable_telemetry, silence_imports

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # as it reads until runpy has found the module
    begin_command()
    start_rank()
disable_telemetry(os.environ)
silence_imports()
