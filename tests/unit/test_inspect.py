"""What a model is made of adds up, and what is said of a text is what the tokenizer and the model do."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from rich.console import Console

from banjoray.errors import ConfigError, ModelError
from banjoray.models.inspect import anatomy, attention_of, text_tokens
from banjoray.models.loading import load_tokenizer
from banjoray.reports.inspection import attention_page, inspect, inspection_lines
from factories import ARCHITECTURES, DEPTH, make_job, tiny_model, tiny_tokenizer

TEXT = "I am so happy zzz"


def shown(found: Any) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        for line in inspection_lines(found):
            console.print(line)
    return capture.get()


def test_bert_base_has_the_published_number_of_weights_and_their_shares() -> None:
    with torch.device("meta"):
        found = anatomy(transformers.BertModel(transformers.BertConfig()))
    assert found.weights == 109_482_240
    shares = {part.name: round(100 * part.weights / found.weights, 2) for part in found.parts}
    assert shares == {"embeddings": 21.77, "encoder": 77.69, "pooler": 0.54}
    assert (found.stack, found.depth) == ("encoder.layer", 12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_parts_of_every_architecture_add_up(tmp_path: Path, architecture: str) -> None:
    folder = tiny_model(tmp_path, architecture)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    found = anatomy(model)
    assert found.weights == sum(parameter.numel() for parameter in model.parameters())
    assert found.depth == (1 if architecture == "albert" else DEPTH)
    names = [part.name for part in found.parts]
    assert names[0] == "embeddings"
    assert names[-1] == "head"
    assert {"encoder", "blocks"} & set(names)


def test_what_a_job_freezes_is_not_counted_as_trained(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps(job.to_json()))
    found = inspect(str(file), "-", ["freeze=backbone"])
    trained = {part.name: part.trained for part in found.anatomy.parts}
    assert trained == {"embeddings": 0, "encoder": 0, "pooler": 0, "head": 32 * 6 + 6}
    assert {row.strategy for row in found.memory} >= {"ddp", "zero2"}
    assert re.search(r"head +198 +[\d.]+% +198 +100%", shown(found))
    assert json.loads(json.dumps(found.to_json()))["anatomy"]["trained"] == 198


def test_a_registered_version_and_a_folder_are_the_same_model(tmp_path: Path) -> None:
    from engines import folder_of, registered

    job = make_job(tmp_path, train__epochs=1)
    version = registered(job)
    found = inspect(str(version), job.registry.root, text=TEXT)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder_of(job, version))
    assert found.anatomy.weights == sum(parameter.numel() for parameter in model.parameters())
    assert found.text is not None
    assert found.text.ids == tuple(tiny_tokenizer()(TEXT)["input_ids"])
    bare = inspect(str(tmp_path / "base"), "-")
    assert found.anatomy.weights == bare.anatomy.weights + 198


def test_the_tokens_of_a_text_are_told_with_their_characters() -> None:
    found = text_tokens(tiny_tokenizer(), TEXT)
    assert found.tokens[0] == "[CLS]"
    assert found.special == (True, *(False,) * 5, True)
    assert [TEXT[span[0] : span[1]] for span in found.spans if span] == TEXT.split()
    assert found.unknown == 1


def test_keys_are_refused_where_there_is_no_job(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no job file"):
        inspect(str(tiny_model(tmp_path)), "-", ["freeze=backbone"])
    with pytest.raises(ModelError, match="no folder here"):
        inspect("nobody/nothing-at-all", "-")


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "roberta", "gpt2"])
def test_the_page_holds_the_models_own_attention(tmp_path: Path, architecture: str) -> None:
    folder = tiny_model(tmp_path, architecture)
    found = inspect(str(folder), "-", text=TEXT)
    page = attention_page(found)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S).group(1))  # type: ignore[union-attr]
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        ids = torch.tensor([load_tokenizer(found.base)(TEXT)["input_ids"]])
        own = torch.stack(model(ids, output_attentions=True).attentions)[:, 0].numpy()
    assert np.allclose(np.array(data["weights"]) / 1000, own, atol=6e-4)
    assert data["tokens"] == list(found.text.tokens)  # type: ignore[union-attr]
    assert "http" not in page


def test_an_attention_page_needs_a_text_of_a_bearable_length(tmp_path: Path) -> None:
    folder = str(tiny_model(tmp_path))
    with pytest.raises(ConfigError, match=r"found 0 tokens; needed a --text of 1 to 128"):
        attention_page(inspect(folder, "-"))
    with pytest.raises(ConfigError, match=r"found 202 tokens"):
        attention_page(inspect(folder, "-", text="happy " * 200))


def test_a_script_in_a_token_stays_a_token(tmp_path: Path) -> None:
    page = attention_page(inspect(str(tiny_model(tmp_path)), "-", text="</script><script>alert(1)</script>"))
    assert "alert(1)" not in page
    assert page.count("</script>") == 2


def test_a_model_without_attention_is_refused() -> None:
    class Silent(torch.nn.Module):
        def forward(self, input_ids: Any, output_attentions: bool) -> Any:
            return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=input_ids)

    with pytest.raises(ModelError, match="Silent gives no attention"):
        attention_of(Silent(), text_tokens(tiny_tokenizer(), TEXT))
