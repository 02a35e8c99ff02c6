"""One run, from a configuration to a folder: plan, session, console, trackers, check."""
