"""What the pipelines share: settings, text, models, training and scoring. It imports none of them.

Importing it switches telemetry off; so each room imports it before anything else.
"""

import os

from novelgpt.settings.telemetry import switch_off

switch_off(os.environ)
