"""Evaluate a trained language model by EleutherAI's lm-eval, beside the model that it was trained from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedsmoothlora.errors import GenerationError
from fedsmoothlora.exports.evaluation import Score, check_numbers, writers
from fedsmoothlora.exports.generation import Writer
from fedsmoothlora.logs import quiet_libraries

# Results that are no metrics.
_OTHERS = ("alias", "sample_len")
_ERROR = "_stderr"
_RESAMPLES = 1000  # for the standard errors of metrics that are no means


def evaluate_with_lm_eval(
    folder: str | Path,
    tasks: Sequence[str],
    *,
    include: str | Path | None = None,
    rows: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    notify: Callable[[str], None] = lambda text: None,
) -> list[Score]:
    """Evaluate the language model of a run or an export, and its base model, on tasks of lm-eval.

    Most tasks load their questions from a hub. If the run trained on chats, questions are turns of a chat.

    Args:
        folder: the folder of a run or of an export.
        tasks: names of tasks or groups, such as ``mmlu``.
        include: a folder with files of further tasks, as ``--include_path`` of lm-eval.
        rows: number of questions of each task, the first ones; all unless given.
        batch_size: number of questions in a batch.
        device: the device that computes, as `machine.device`.
        notify: called with the progress in a sentence.

    Returns:
        A score for every metric of every task and group, in lm-eval's order.

    Raises:
        GenerationError: lm-eval is not installed, knows no such task or cannot run it, or the model is no
            causal language model.
        ConfigError: this machine has no such device.
        ExportError, NoExportError, StateError: as `load_writer`.
    """
    if find_spec("lm_eval") is None:
        raise GenerationError("lm-eval is not installed: pip install 'fedsmoothlora[eval]'")
    if not tasks:
        raise GenerationError("no task of lm-eval is named, such as --lm-eval mmlu,hellaswag")
    check_numbers(rows, batch_size)
    with quiet_libraries():
        known = _known(tasks, include)
        results = []
        for what, writer in writers(folder, device):
            notify(f"{what} model: lm-eval on {', '.join(tasks)}")
            results.append(_results(writer, tasks, known, rows, batch_size))
    trained, base = results[0], results[1] if len(results) > 1 else None
    return list(_scores(trained, base))


def _known(tasks: Sequence[str], include: str | Path | None) -> Any:
    """The tasks that lm-eval knows, with those of ``include``."""
    from lm_eval.tasks import TaskManager

    if include is not None and not Path(include).is_dir():
        raise GenerationError(f"{include}: there is no such folder of tasks of lm-eval")
    known = TaskManager(include_path=None if include is None else str(include))
    if unknown := [name for name in tasks if not known.match_tasks([name])]:
        raise GenerationError(
            f"lm-eval has no task {unknown[0]!r}; `lm-eval ls tasks` lists them, and --include names a "
            "folder of your own"
        )
    return known


def _results(
    writer: Writer, tasks: Sequence[str], known: Any, rows: int | None, batch_size: int
) -> Mapping[str, Any]:
    """The results of one model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        model = HFLM(pretrained=writer.model, tokenizer=writer.tokenizer, batch_size=batch_size)
        found: Mapping[str, Any] | None = simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=known,
            limit=rows,
            batch_size=batch_size,
            apply_chat_template=writer.prompting.chat,
            log_samples=False,
            bootstrap_iters=_RESAMPLES,
        )
    except Exception as error:  # of datasets, of the hub's client, or of a task's own code
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
        raise GenerationError(f"lm-eval cannot run {', '.join(tasks)}: {first}") from None
    assert found is not None  # in the first process
    return found


def _scores(trained: Mapping[str, Any], base: Mapping[str, Any] | None) -> Iterator[Score]:
    """One score for every metric."""
    counts = trained.get("n-samples", {})
    for task, metrics in trained["results"].items():
        for key, value in metrics.items():
            name, _, filter_ = key.partition(",")
            if name in _OTHERS or name.endswith(_ERROR) or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{name}{_ERROR},{filter_}")
            of_base = None if base is None else base["results"][task].get(key)
            yield Score(
                benchmark=str(metrics.get("alias", task)).strip(),
                metric=name if filter_ in ("none", "") else f"{name} ({filter_})",
                rows=int(counts.get(task, {}).get("effective", 0)),
                trained=float(value),
                base=None if of_base is None else float(of_base),
                error=float(error) if isinstance(error, int | float) else None,
            )
