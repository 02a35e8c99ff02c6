"""The rounds: messages, client, server, participation, upload checks, transport and engines."""
