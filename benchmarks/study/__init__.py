"""Is FedSmoothLoRA ahead? One resumable command, `python -m benchmarks.study`, and docs/results.md.

===============  ================================================================================
``settings/``    one TOML file a setting: configuration, scenarios, variants, grids, seeds
``setting.py``   reads them
``driver.py``    tunes, then compares, one variant after the other; every run is recorded at once
``records.py``   the records, which are committed: ``results/SETTING/SCENARIO/*.jsonl``
``tables.py``    what the records say, as the tables of docs/results.md
``figures.py``   the same as pictures
===============  ================================================================================
"""
