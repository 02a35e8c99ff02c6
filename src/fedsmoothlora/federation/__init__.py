"""The federation: messages, client, server, rounds, participation, upload checks, transport and engines."""
