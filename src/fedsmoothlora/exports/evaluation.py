"""Evaluate a trained language model on a suite of questions, beside the model that it was trained from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedsmoothlora.data.chat_template import ChatTemplate
from fedsmoothlora.data.examples import Batch
from fedsmoothlora.data.prompts import Speaker, Template, fit
from fedsmoothlora.data.suites import SUITES, Benchmark, Question, with_own_questions
from fedsmoothlora.data.tokens import Completions, by_length
from fedsmoothlora.errors import GenerationError
from fedsmoothlora.exports.generation import Writer, load_base_writer, load_writer
from fedsmoothlora.modeling.text import pad_token
from fedsmoothlora.tasks.metrics.multiple_choice import MultipleChoice
from fedsmoothlora.tasks.objectives.language import CausalLanguageModel, answer_logits

_SEED = 0  # of the questions that are drawn
_LONGEST = 1024  # tokens of a question with its answer


@dataclass(frozen=True, kw_only=True)
class Score:
    """The result of a model, or of two, on a set of questions.

    Attributes:
        benchmark: name of the set of questions.
        metric: ``accuracy``, or ``loss`` per token of the answers if these are free text.
        rows: number of questions.
        trained: of the trained model.
        base: of the model that it was trained from; None if it is not known.
        error: standard error of the trained model's result, if it is known.
        is_mean: whether it is the mean of several benchmarks.
    """

    benchmark: str
    metric: str
    rows: int
    trained: float
    base: float | None = None
    error: float | None = None
    is_mean: bool = False

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the trained model's result over questions; None for a loss and for a mean.

        That of an accuracy is Wilson's. With a standard error, it is 1.96 of them to both sides.
        """
        if self.error is not None:
            return self.trained - 1.96 * self.error, self.trained + 1.96 * self.error
        if self.metric != "accuracy" or self.is_mean:
            return None
        from scipy import stats  # here, because it takes a while to load

        found = stats.binomtest(round(self.trained * self.rows), self.rows).proportion_ci(method="wilson")
        return float(found.low), float(found.high)


def evaluate(
    folder: str | Path,
    suite: str,
    *,
    own: str | Path | None = None,
    rows: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    notify: Callable[[str], None] = lambda text: None,
) -> list[Score]:
    """Evaluate the language model of a run or an export, and its base model, on a suite.

    Questions with options are answered by the likeliest option: by its letter, or by the word itself.
    They are given in the form that the run's prompts had: as plain text, or as a turn of a chat, after the
    run's system message if that names no columns. Both models
    are given the same questions, of which too long ones lose their beginning.

    Args:
        folder: the folder of a run or of an export.
        suite: ``medical``, ``finance`` or ``general``.
        own: a file or folder of the user with questions that no package has: the Financial PhraseBank for
            ``finance``, MMLU with its subjects for ``general``.
        rows: number of questions of each benchmark, drawn by a fixed seed; all unless given.
        batch_size: number of questions in a batch.
        device: the device that computes, as `machine.device`.
        notify: called with the progress in a sentence.

    Returns:
        The score of every benchmark, and after the subjects of MMLU their mean.

    Raises:
        GenerationError: the suite is unknown or has no questions of the user's own, or the model is no causal
            language model.
        DataError: the user's own questions cannot be read.
        PackageError: the questions cannot be fetched.
        ConfigError: this machine has no such device.
        ExportError, NoExportError, StateError: as `load_writer`.
    """
    if suite not in SUITES:
        raise GenerationError(f"unknown suite {suite!r}; there are {', '.join(SUITES)}")
    check_numbers(rows, batch_size)
    benchmarks = SUITES[suite] if own is None else with_own_questions(suite, Path(own))
    questions = {benchmark.name: _drawn(benchmark.load(), rows) for benchmark in benchmarks}
    found: list[dict[str, float]] = []
    for what, writer in writers(folder, device):
        found.append({})
        for name, asked in questions.items():
            notify(f"{what} model: {len(asked)} questions of {name}")
            found[-1][name] = score(writer, asked, batch_size)
    scores = {
        name: Score(
            benchmark=name,
            metric="accuracy" if asked[0].options else "loss",
            rows=len(asked),
            trained=found[0][name],
            base=found[1][name] if len(found) > 1 else None,
        )
        for name, asked in questions.items()
    }
    return [*scores.values(), *_means(benchmarks, scores)]


def check_numbers(rows: int | None, batch_size: int) -> None:
    """Raise ``GenerationError`` for numbers of questions below 1."""
    if (rows is not None and rows < 1) or batch_size < 1:
        raise GenerationError(f"rows = {rows}, batch_size = {batch_size}: should be at least 1")


def writers(folder: str | Path, device: str) -> Iterator[tuple[str, Writer]]:
    """The trained model and the base model, if it has a name. One is loaded after the other was used."""
    for what, load in (("trained", load_writer), ("base", load_base_writer)):
        writer = load(folder, device=device)
        if writer is None:
            return
        yield what, writer
        del writer  # two models at once may not fit into memory


def _means(benchmarks: Sequence[Benchmark], scores: Mapping[str, Score]) -> Iterator[Score]:
    """The mean over the parts of every benchmark that has parts, such as the subjects of MMLU."""
    for whole in dict.fromkeys(benchmark.part_of for benchmark in benchmarks if benchmark.part_of):
        parts = [scores[benchmark.name] for benchmark in benchmarks if benchmark.part_of == whole]
        bases = [part.base for part in parts if part.base is not None]
        yield Score(
            benchmark=f"{whole}, mean of {len(parts)}",
            metric=parts[0].metric,
            rows=sum(part.rows for part in parts),
            trained=float(np.mean([part.trained for part in parts])),
            base=float(np.mean(bases)) if bases else None,
            is_mean=True,
        )


def score(writer: Writer, questions: Sequence[Question], batch_size: int) -> float:
    """The accuracy of a model, or its loss per token of the answers if the questions have no options."""
    chat = writer.prompting.chat
    prompts = _prompts(writer, questions)
    most = min(writer.positions or _LONGEST, _LONGEST)
    device = next(writer.model.parameters()).device

    def to_device(batch: Batch) -> Batch:
        return {name: value.to(device) for name, value in batch.items()}

    def completions(rows: Sequence[int], answers: Sequence[str]) -> Completions:
        # After a generation prompt of a chat, an answer begins at once.
        texts = [answer if chat else f" {answer}" for answer in answers]
        tokens = writer.tokenizer(texts, add_special_tokens=False)["input_ids"]
        before, after, _ = fit([prompts[row] for row in rows], tokens, most)
        return Completions(before, after, pad_token(writer.tokenizer))

    everyone = range(len(questions))
    if not questions[0].options:
        answers = completions(everyone, [question.answer for question in questions])
        evaluation = CausalLanguageModel().evaluate(writer.model, answers, batch_size, to_device)
        return evaluation.metrics["loss"]
    pairs = [(row, option) for row in everyone for option in questions[row].options]
    options = completions([row for row, _ in pairs], [option for _, option in pairs])
    counts = [len(question.options) for question in questions]
    right = [question.options.index(question.answer) for question in questions]
    if all(len(answer) == 1 for answer in options.answers):
        chosen = _best_tokens(writer.model, options, counts, batch_size, to_device)
        return float(np.mean(np.array(chosen) == np.array(right)))
    choice = MultipleChoice(options=options, counts=counts, right=right, batch_size=batch_size)
    return choice.take(writer.model, to_device)["accuracy"]


def _prompts(writer: Writer, questions: Sequence[Question]) -> list[list[int]]:
    """The tokens of the questions, in a chat after the run's system message, unless that names columns."""
    chat, system = writer.prompting.chat, writer.prompting.system
    texts = [question.prompt for question in questions]
    if not chat or system is None or Template(system, "the run's system message").columns:
        return Speaker(writer.tokenizer, chat).prompts(texts)
    system = Template(system, "the run's system message").fill({})
    if writer.tokenizer.is_fast and not ChatTemplate(writer.tokenizer).takes_system:
        return Speaker(writer.tokenizer, chat).prompts([f"{system}\n\n{text}" for text in texts])
    return Speaker(writer.tokenizer, chat).prompts(texts, [system] * len(texts))


@torch.inference_mode()
def _best_tokens(
    model: nn.Module,
    options: Completions,
    counts: Sequence[int],
    batch_size: int,
    to_device: Callable[[Batch], Batch],
) -> list[int]:
    """The index of each question's likeliest option, if options are single tokens: one row a question."""
    model.eval()
    starts = np.cumsum([0, *counts[:-1]]).tolist()
    first = Completions(
        [options.prompts[at] for at in starts], [options.answers[at] for at in starts], options.pad
    )
    found = [0] * len(counts)
    order = by_length(first, len(first))
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        logits, _ = answer_logits(model, to_device(first.batch(rows)))
        for row, own in zip(rows, logits[:, -1].float().cpu(), strict=True):
            tokens = [answer[0] for answer in options.answers[starts[row] : starts[row] + counts[row]]]
            found[row] = int(own[tokens].argmax())
    return found


def _drawn(questions: list[Question], rows: int | None) -> list[Question]:
    if rows is None or rows >= len(questions):
        return questions
    drawn = np.random.default_rng(_SEED).permutation(len(questions))[:rows]
    return [questions[row] for row in sorted(drawn.tolist())]
