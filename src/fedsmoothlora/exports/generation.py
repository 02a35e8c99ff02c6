"""Generate text with a trained language model, with prompts in the form that they had in training."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedsmoothlora.data.prompts import Speaker, Template
from fedsmoothlora.errors import GenerationError
from fedsmoothlora.exports.loading import FACTS, load_adapter, read_facts, readable
from fedsmoothlora.exports.merged import merge
from fedsmoothlora.exports.run_model import load_run_model, open_run
from fedsmoothlora.exports.trained import global_model
from fedsmoothlora.logs import quiet_libraries
from fedsmoothlora.modeling.text import load_tokenizer

_TASK = "text-generation"


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """The form of prompts in training.

    Attributes:
        template: text with columns in braces, ``Question: {question}``.
        chat: whether a prompt is a turn of the tokenizer's chat template.
        system: template of the chat's system message.
    """

    template: str = "{prompt}"
    chat: bool = False
    system: str | None = None

    def tokens(self, tokenizer: Any, prompt: str) -> list[int]:
        """The tokens of a prompt, after which the model generates.

        Args:
            tokenizer: the tokenizer of the model.
            prompt: a JSON object with the value of each of the template's columns. If there is only one
                column, or only space between the columns, any text, which replaces all of them.

        Raises ``GenerationError`` if the template needs several columns and they are not given.
        """
        text, system = self._filled(prompt)
        (tokens,) = Speaker(tokenizer, self.chat).prompts([text], None if system is None else [system])
        return tokens

    def _filled(self, prompt: str) -> tuple[str, str | None]:
        """The text of the prompt, and of the system message if there is one."""
        template = Template(self.template, "the run's prompt")
        system = None if self.system is None else Template(self.system, "the run's system message")
        columns = dict.fromkeys((*template.columns, *(system.columns if system else ())))
        try:
            row = json.loads(prompt)
        except ValueError:
            row = None
        if isinstance(row, dict) and columns and row.keys() == columns.keys():
            values = {name: str(value) for name, value in row.items()}
            return template.fill(values), None if system is None else system.fill(values)
        spot = template.spot
        if spot is None or (system and system.columns):
            example = json.dumps(dict.fromkeys(columns, "..."))
            raise GenerationError(
                f"the run's prompts have the columns {', '.join(columns)}: give them as JSON, '{example}'"
            )
        before, after = spot
        return before + prompt + after, None if system is None else system.fill({})


@dataclass(frozen=True)
class Writer:
    """A trained language model with its tokenizer.

    Attributes:
        model: the trained model.
        tokenizer: its tokenizer.
        prompting: the form of prompts in training.
    """

    model: nn.Module
    tokenizer: Any
    prompting: Prompting

    @torch.inference_mode()
    def write(
        self, prompt: str, *, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 0
    ) -> str:
        """Generate text after a prompt.

        Args:
            prompt: the value of the template's only column, or a JSON object with a value for each column.
            max_new_tokens: the largest number of generated tokens.
            temperature: 0 takes the most likely token each time; with a higher one, tokens are drawn.
            seed: seed of the draws.

        Raises:
            GenerationError: a number is out of range, the prompt is too long for the model, or the template
                needs other columns.
        """
        if not (math.isfinite(temperature) and temperature >= 0) or max_new_tokens < 1:
            raise GenerationError(
                f"temperature = {temperature}, max_new_tokens = {max_new_tokens}: should be at least 0 and 1"
            )
        tokens = self.prompting.tokens(self.tokenizer, prompt)
        config: Any = self.model.config
        if not tokens:
            raise GenerationError("the prompt is empty: the model needs at least one token to go on from")
        most = getattr(config, "max_position_embeddings", None)
        if most is not None and len(tokens) + max_new_tokens > most:
            raise GenerationError(
                f"the prompt has {len(tokens)} tokens, and the model takes {most} with those that it writes: "
                + (f"ask for at most {most - len(tokens)} new ones" if len(tokens) < most else "shorten it")
            )
        sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        pad = self.tokenizer.pad_token_id
        inputs = torch.tensor([tokens], device=next(self.model.parameters()).device)
        generate: Any = self.model.generate
        with torch.random.fork_rng(), quiet_libraries():
            torch.manual_seed(seed)
            found = generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
                **sampling,
            )
        text: str = self.tokenizer.decode(found[0, len(tokens) :], skip_special_tokens=True)
        return text


def load_writer(folder: str | Path) -> Writer:
    """Load the language model in the folder of a run (its newest checkpoint) or of an export.

    Raises:
        GenerationError: it is no causal language model.
        ExportError, NoExportError: the folder is neither a run's nor an export's, or no round is finished.
        StateError: the base weights or the configuration have changed since the run began.
        NotKeptError: the method has no global model.
        WrongBaseError: an adapter's base model has other weights.
    """
    folder = Path(folder)
    with quiet_libraries():
        writer = _from_export(folder) if (folder / FACTS).is_file() else _from_run(folder)
    writer.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return writer


def generate(
    folder: str | Path, prompt: str, *, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 0
) -> str:
    """Generate text with the model of a run or an export; see `load_writer` and `Writer.write`."""
    return load_writer(folder).write(
        prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )


def _from_export(folder: Path) -> Writer:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    facts = read_facts(folder)
    _check_task(facts["task"], folder, exported=True)
    model: nn.Module
    if facts["as"] == "merged":
        with readable(folder):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    else:
        model = load_adapter(folder)
    with readable(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return Writer(model, tokenizer, Prompting(**facts["prompt"] or {}))


def _from_run(folder: Path) -> Writer:
    run_model = load_run_model(open_run(folder), lambda note: None)
    _check_task(run_model.task, folder, exported=False)
    trained = global_model(run_model.server)
    base = run_model.base()
    merge(trained, base.model)
    tokenizer = load_tokenizer(run_model.config.model)
    return Writer(base.model, tokenizer, Prompting(**run_model.prompt or {}))


def _check_task(task: str | None, folder: Path, *, exported: bool) -> None:
    if task == _TASK:
        return
    where, first = folder, ""
    if not exported:
        where, first = Path("DIR"), f"fedsmoothlora export {folder} --as merged --out DIR, then "
    raise GenerationError(
        f"the model in {folder} is for {task or 'something else'}: only causal language models write text. "
        f"To use it: {first}transformers.pipeline({task!r}, model={str(where)!r})"
    )
