"""Is FedSmoothLoRA ahead? The resumable command `python -m benchmarks.study`, and the pages of its results.

==================  =============================================================================
``settings/``       one TOML file for each setting: recipe, scenarios, variants, grids, seeds, notes
``setting.py``      reads them
``driver.py``       tunes, then compares, one variant after another; records every run at once
``records.py``      the records, which are committed: ``results/SETTING/SCENARIO/*.jsonl``
``findings.py``     the records of a scenario, and comparisons of its variants
``tables.py``       the tables of a scenario
``equal_bytes.py``  the summary of the second study: few bits at higher rank, at the bytes of FedIT
``first_study.py``  the summary of the first study: the published settings
``figures.py``      the records as pictures
``repeat.py``       carries out recorded runs again and compares them with their records
``page.py``         writes docs/results.md, docs/first-study.md and docs/results/
==================  =============================================================================
"""
