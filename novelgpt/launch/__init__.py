"""Starts the processes of a run on one host or several, hands signals on, and ends all of them when one dies."""
