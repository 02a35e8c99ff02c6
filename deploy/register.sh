#!/bin/sh
# Registers the key of every site of compose.yaml, in the coordinator's folder while the coordinator runs. Once.
set -eu

set -a
. federation/flower.env
set +a
for key in keys/*.key.pub; do
  flwr supernode register "$key"
done
