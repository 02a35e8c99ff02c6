"""Is FedSmoothLoRA ahead? The resumable command `python -m benchmarks.study`, and its page, docs/results.md.

===============  ================================================================================
``settings/``    one TOML file for each setting: recipe, scenarios, variants, grids, seeds, notes
``setting.py``   reads them
``driver.py``    tunes, then compares, one variant after another; records every run at once
``records.py``   the records, which are committed: ``results/SETTING/SCENARIO/*.jsonl``
``tables.py``    the records as tables and as sentences of the summary
``figures.py``   the records as pictures
``repeat.py``    carries out recorded runs again and compares them with their records
``page.py``      writes the summary of docs/results.md, and docs/results/
===============  ================================================================================
"""
