from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import BERT_POSITIONS, Malicious, save_bert

from nnunet_diffext.pretrained import PretrainedError
from nnunet_diffext.pretrained.text import DEFAULT_ENCODER, VARIABLE, encode_texts, load_text_encoder

TEXTS = {"kidney": "CT image of the left kidneys", "liver": "liver"}


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    save_bert(tmp_path / "bert")
    return tmp_path / "bert"


def change_weights(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(change(state), folder / "model.safetensors", metadata={"format": "pt"})


def test_states_are_those_of_the_model(tmp_path: Path) -> None:
    model = save_bert(tmp_path / "bert")
    states, mask = encode_texts(TEXTS, str(tmp_path / "bert"))
    assert states.shape == (2, 9, 16) and states.dtype == torch.float32 and not states.requires_grad
    # [CLS] liver [SEP]: 2, 5, 3 in the vocabulary.
    assert mask.tolist() == [[True] * 9, [True] * 3 + [False] * 6]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[2, 5, 3]])).last_hidden_state[0]
    torch.testing.assert_close(states[1, :3], expected)
    assert states[1, 3:].abs().max() == 0 and states[1, :3].std() > 0.1


def test_padding_changes_nothing(bert: Path) -> None:
    together = encode_texts(TEXTS, str(bert))
    alone = encode_texts({"liver": TEXTS["liver"]}, str(bert))
    assert alone.mask.all() and alone.states.shape[1] == 3
    assert torch.equal(together.states[1, :3], alone.states[0])


def test_deterministic_and_no_effect_on_the_random_generator(bert: Path) -> None:
    before = torch.get_rng_state()
    first, second = (encode_texts(TEXTS, str(bert)).states for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_order_of_the_labels(bert: Path) -> None:
    forward = encode_texts(TEXTS, str(bert)).states
    backward = encode_texts(dict(reversed(TEXTS.items())), str(bert)).states
    assert torch.equal(forward.flip(0), backward) and not torch.equal(forward, backward)


def test_the_variable_names_the_encoder(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(bert))
    assert load_text_encoder().source == str(bert)
    with pytest.raises(PretrainedError, match="no/such"):
        load_text_encoder("no/such")


def test_without_network_the_message_names_three_ways_out() -> None:
    with pytest.raises(PretrainedError) as caught:
        encode_texts(TEXTS)
    for part in (DEFAULT_ENCODER, "connect to the network once", VARIABLE, "randomText"):
        assert part in str(caught.value)


def test_wrong_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(PretrainedError, match=f"empty cannot be loaded.*{VARIABLE}"):
        load_text_encoder(str(tmp_path / "empty"))


def test_transformers_is_missing(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PretrainedError, match=r"pip install 'nnunet_diffext\[text\]'"):
        load_text_encoder(str(bert))


def test_a_long_prompt_is_refused_not_truncated(bert: Path) -> None:
    fits = " ".join(["liver"] * (BERT_POSITIONS - 2))
    assert encode_texts({"liver": fits}, str(bert)).mask.sum() == BERT_POSITIONS
    encoder = load_text_encoder(str(bert))
    assert encoder.limit == BERT_POSITIONS and encoder.token_counts({"a": fits + " liver"}) == {"a": 13}
    with pytest.raises(PretrainedError, match="'kidney' has 13 tokens.* at most 12"):
        encoder.encode({"liver": fits, "kidney": fits + " liver"})


def test_the_limit_of_the_tokenizer_counts_too(bert: Path) -> None:
    (bert / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 7}))
    assert load_text_encoder(str(bert)).limit == 7


def test_positions_that_roberta_reserves(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    from nnunet_diffext.pretrained.text import _token_limit

    config = RobertaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=1)
    config.max_position_embeddings = 20
    model = RobertaModel(config).eval()
    limit = _token_limit(type("Tokenizer", (), {"model_max_length": int(1e30)}), model)
    assert limit == 18
    model(input_ids=torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 5))


@pytest.mark.parametrize("texts", [{"liver": ""}, {"liver": " \n"}])
def test_empty_text(bert: Path, texts: dict[str, str]) -> None:
    with pytest.raises(PretrainedError, match="prompt of label 'liver' is empty"):
        encode_texts(texts, str(bert))


def test_no_text(bert: Path) -> None:
    with pytest.raises(PretrainedError, match="no text to encode"):
        encode_texts({}, str(bert))


def test_missing_weights_are_never_random(bert: Path) -> None:
    key = "bert.encoder.layer.1.output.dense.weight"
    change_weights(bert, lambda state: {k: v for k, v in state.items() if k != key})
    with pytest.raises(PretrainedError, match="1 of the weights are missing.*layer.1.output.dense.weight"):
        load_text_encoder(str(bert))


def test_weights_without_place_are_refused(bert: Path) -> None:
    config = json.loads((bert / "config.json").read_text()) | {"num_hidden_layers": 1}
    (bert / "config.json").write_text(json.dumps(config))
    with pytest.raises(PretrainedError, match=r"no place in its configuration, such as .*layer\.1\."):
        load_text_encoder(str(bert))


def test_weights_of_another_shape_are_refused(bert: Path) -> None:
    config = json.loads((bert / "config.json").read_text()) | {"intermediate_size": 24}
    (bert / "config.json").write_text(json.dumps(config))
    with pytest.raises(PretrainedError, match="cannot be loaded"):
        load_text_encoder(str(bert))


def test_old_names_of_the_weights_are_known(bert: Path) -> None:
    expected = encode_texts(TEXTS, str(bert)).states
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def rename(state):
        for new, former in old.items():
            state = {key.replace(new, former): value for key, value in state.items()}
        return state | {"bert.embeddings.position_ids": torch.arange(BERT_POSITIONS)[None]}

    change_weights(bert, rename)
    torch.testing.assert_close(encode_texts(TEXTS, str(bert)).states, expected, rtol=0, atol=0)


def test_no_tokenizer(bert: Path) -> None:
    for file in bert.glob("*"):
        if "vocab" in file.name or "token" in file.name:
            file.unlink()
    with pytest.raises(PretrainedError, match="cannot be loaded"):
        load_text_encoder(str(bert))


def test_tokenizer_of_another_model(bert: Path) -> None:
    with (bert / "vocab.txt").open("a") as file:
        file.write("spleen\nheart\n")
    with pytest.raises(PretrainedError, match="its tokenizer knows 16 tokens, the model 14"):
        load_text_encoder(str(bert))


def test_a_malicious_file_does_not_run(bert: Path, tmp_path: Path) -> None:
    (bert / "model.safetensors").unlink()
    torch.save({"bert.embeddings.word_embeddings.weight": Malicious(tmp_path / "ran")}, bert / "pytorch_model.bin")
    with pytest.raises(PretrainedError, match="cannot be loaded"):
        load_text_encoder(str(bert))
    assert not (tmp_path / "ran").exists()
