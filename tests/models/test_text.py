"""Text becomes the published states, in one window or two, and what does not fit is said."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from golden_vectors import load
from pixcell.errors import MissingWeights, ModelError, WrongWeights
from pixcell.models.pathldm_layout import from_ldm, to_ldm
from pixcell.models.text import TextEncoder, encode_tokens, load_text_tower, load_tokenizer
from pixcell.models.weights import fit_weights
from tiny_pathldm import WIDTH, tiny_text_tower, tiny_tokenizer

CLOSE = {"rtol": 0, "atol": 1e-4}  # one forward pass in float32, values of order 1


def encoder(**options):
    return TextEncoder(tiny_text_tower(), tiny_tokenizer(), **options)


def words(count):
    return " ".join("ab"[number % 2] for number in range(count))


# ── states ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def published():
    from transformers import CLIPTextConfig, CLIPTextModel

    tensors, about = load("pathldm-text-tiny")
    tower = CLIPTextModel(CLIPTextConfig(**about["config"])).eval()
    state = {name[5:]: value.float() for name, value in tensors.items() if name.startswith("text.")}
    fit_weights(tower, from_ldm(tower, state), "the golden case")
    return tower, tensors


@pytest.mark.parametrize("places", [77, 154])
@torch.no_grad()
def test_states_are_the_published_ones(published, places):
    """Empty and full prompts; with 154 places two windows in one causal pass."""
    tower, tensors = published
    states = encode_tokens(tower, tensors[f"in.ids{places}"], tensors[f"in.mask{places}"])
    torch.testing.assert_close(states, tensors[f"out.z{places}"], **CLOSE)


@torch.no_grad()
def test_the_tower_is_the_same_after_two_windows(published):
    tower, tensors = published
    before = encode_tokens(tower, tensors["in.ids77"], tensors["in.mask77"])
    encode_tokens(tower, tensors["in.ids154"], tensors["in.mask154"])
    assert tower.get_input_embeddings().weight.shape[0] == 120
    assert torch.equal(encode_tokens(tower, tensors["in.ids77"], tensors["in.mask77"]), before)


@torch.no_grad()
def test_three_windows_begin_with_two(published):
    """A causal tower does not look ahead, however many windows follow."""
    tower, tensors = published
    ids, mask = tensors["in.ids154"], tensors["in.mask154"]
    longer = encode_tokens(tower, torch.cat([ids, ids[:, :77]], 1), torch.cat([mask, mask[:, :77]], 1))
    torch.testing.assert_close(longer[:, :154], tensors["out.z154"], **CLOSE)


@torch.no_grad()
def test_a_part_of_a_window_is_refused(published):
    with pytest.raises(ModelError, match="100 places"):
        encode_tokens(
            published[0], torch.zeros(1, 100, dtype=torch.long), torch.ones(1, 100, dtype=torch.long)
        )


# ── prompts ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "places"),
    [
        ({}, 154),
        ({"length": 154}, 154),
        ({"length": 77}, 77),
        ({"length": 78}, 154),
        ({"length": 200}, 231),
        ({"policy": "pad77"}, 77),
        ({"policy": "pad77", "length": 77}, 77),
        ({"policy": "tight"}, 77),
        ({"policy": "tight", "length": 35}, 35),
    ],
)
def test_a_policy_says_how_many_places_there_are(options, places):
    states = encoder(**options)(["ab", ""])
    assert states.states.shape == (2, places, WIDTH)
    assert states.mask.sum(dim=1).tolist() == [4, 2]
    assert states.num_tokens == (4, 2)


def test_ids_are_begin_text_end_padding():
    ids, mask, _ = encoder(policy="tight", length=6).tokenize(["a b", ""])
    begin, end = tiny_tokenizer().bos_token_id, tiny_tokenizer().eos_token_id
    a, b = tiny_tokenizer().convert_tokens_to_ids(["a</w>", "b</w>"])
    assert ids.tolist() == [[begin, a, b, end, end, end], [begin, end, end, end, end, end]]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]


def test_padding_is_the_tokenizers_own():
    """PLIP's or anyone's padding token is taken from its tokenizer."""
    other = TextEncoder(tiny_text_tower(), tiny_tokenizer(pad_token="a"), policy="tight", length=5)
    ids, _, _ = other.tokenize("b")
    assert ids[0, 3:].tolist() == [tiny_tokenizer().convert_tokens_to_ids("a")] * 2


def test_case_and_blanks_do_not_matter_to_clip():
    states = encoder()(["high tumor; low til;  s", "High Tumor;low til;s"]).states
    assert torch.equal(states[0], states[1])


def test_short_policies_begin_like_long_ones():
    """A causal tower: the states of the text do not depend on how much padding follows."""
    text = "high tumor; low til; s"
    long, short = encoder()(text), encoder(policy="tight", length=30)(text)
    count = long.num_tokens[0]
    torch.testing.assert_close(long.states[:, :count], short.states[:, :count])


def test_a_prompt_alone_is_the_row_of_a_batch():
    prompts = ["high tumor", "", words(100)]
    together = encoder()(prompts).states
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(encoder()(prompt).states[0], together[row])


def test_padded_places_have_states_of_their_own():
    empty = encoder()("").states[0]
    assert (empty[2:].std(dim=0) > 1e-3).any()


def test_a_prompt_that_does_not_fit_is_refused():
    with pytest.raises(ModelError, match=r"1 of 2 prompts need more than the 77 places.*number 1 .*needs 78"):
        encoder(policy="pad77")([words(75), words(76)])


def test_a_prompt_that_does_not_fit_is_cut_only_if_asked(caplog):
    cut = encoder(policy="pad77", too_long="truncate")
    states = cut([words(75), words(90)])
    assert "1 of 2 prompts" in caplog.text
    assert states.num_tokens == (77, 92)
    assert torch.equal(states.states[0], states.states[1])  # the end token stays, the end of the text goes
    assert cut.tokenize(words(90))[0][0, -1] == tiny_tokenizer().eos_token_id


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "long"}, "windows, pad77, tight"),
        ({"policy": "pad77", "length": 50}, "'tight'"),
        ({"policy": "tight", "length": 78}, "'windows'"),
        ({"length": 1}, "begin and an end"),
        ({"too_long": "cut"}, "truncate"),
    ],
)
def test_contradictory_options_are_refused(options, message):
    with pytest.raises(ModelError, match=message):
        encoder(**options)


@pytest.mark.parametrize("prompts", [[], ["a", None], [1]])
def test_what_is_no_text_is_refused(prompts):
    with pytest.raises(ModelError, match="prompts must be texts"):
        encoder().tokenize(prompts)


@pytest.mark.parametrize("size", [50, 500])
def test_a_tokenizer_of_another_model_is_refused(size):
    with pytest.raises(ModelError, match="not of the same model"):
        TextEncoder(tiny_text_tower(vocab_size=size, bos_token_id=1, eos_token_id=2), tiny_tokenizer())


def test_states_are_float32_whatever_the_tower_computes_in():
    half = TextEncoder(tiny_text_tower().to(torch.bfloat16), tiny_tokenizer())(["high tumor", ""])
    full = encoder()(["high tumor", ""])
    assert half.states.dtype == torch.float32
    torch.testing.assert_close(
        half.states, full.states, rtol=0, atol=0.1
    )  # 8 bits, two layers, norm at the end


# ── files ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folder(tmp_path):
    """A text encoder as transformers saves it."""
    tiny_text_tower().save_pretrained(tmp_path / "plip")
    tiny_tokenizer().save_pretrained(tmp_path / "plip")
    return tmp_path / "plip"


def test_a_saved_text_encoder_loads_as_itself(folder):
    loaded = TextEncoder.from_pretrained(folder, policy="pad77")
    assert torch.equal(loaded("low til").states, encoder(policy="pad77")("low til").states)
    assert loaded.made_by() == encoder(policy="pad77", name="plip").made_by()


def test_a_pipeline_folder_is_a_text_encoder_too(tmp_path):
    tiny_text_tower().save_pretrained(tmp_path / "text_encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert torch.equal(TextEncoder.from_pretrained(tmp_path)("til").states, encoder()("til").states)


def whole_clip(folder):
    """Describe a whole CLIP whose text tower is the tiny one; return its tensors, named as of old."""
    tower = tiny_text_tower()
    config = {"model_type": "clip", "text_config": tower.config.to_dict(), "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    state = to_ldm(tower)
    state |= {"text_model.embeddings.position_ids": torch.arange(77)[None], "logit_scale": torch.ones(())}
    state |= {"vision_model.class_embedding": torch.zeros(4), "text_projection.weight": torch.zeros(4, 4)}
    return state


def test_the_tower_of_a_whole_clip_is_read_alone(tmp_path):
    torch.save(whole_clip(tmp_path), tmp_path / "pytorch_model.bin")
    loaded = TextEncoder(load_text_tower(tmp_path), tiny_tokenizer())
    assert torch.equal(loaded("til").states, encoder()("til").states)


def test_a_tower_that_lacks_a_tensor_is_refused(tmp_path):
    state = whole_clip(tmp_path)
    state.pop("text_model.final_layer_norm.bias")
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(WrongWeights, match=r"1 tensors missing .*final_layer_norm\.bias"):
        load_text_tower(tmp_path)


def test_a_clip_without_text_is_refused(tmp_path):
    whole_clip(tmp_path)
    torch.save({"vision_model.class_embedding": torch.zeros(4)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WrongWeights, match="no text tower"):
        load_text_tower(tmp_path)


def test_a_model_of_another_kind_is_refused(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match="'bert'"):
        TextEncoder.from_pretrained(folder)


def test_weights_of_another_width_are_refused(folder):
    file = folder / "model.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.endswith("final_layer_norm.weight"))
    save_file(state | {name: torch.ones(8)}, file, metadata={"format": "pt"})
    with pytest.raises(WrongWeights, match="of another shape"):
        TextEncoder.from_pretrained(folder)


def test_missing_files_are_named(folder, tmp_path):
    for file in folder.glob("*token*"):
        file.unlink()
    for file in ("vocab.json", "merges.txt"):
        (folder / file).unlink(missing_ok=True)
    with pytest.raises(MissingWeights, match="no tokenizer"):
        TextEncoder.from_pretrained(folder)
    with pytest.raises(MissingWeights, match="no tokenizer"):  # transformers would make one without words
        load_tokenizer(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingWeights, match=r"config\.json"):
        TextEncoder.from_pretrained(tmp_path / "empty")


def test_nothing_is_downloaded_unless_asked_for(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repository, **options: asked.append((repository, options)) or str(tmp_path),
    )
    with pytest.raises(MissingWeights):
        TextEncoder.from_pretrained("plip")
    assert [(repository, options["local_files_only"]) for repository, options in asked] == [
        ("vinid/plip", True)
    ]


def test_the_error_for_an_absent_encoder_shows_the_ways_out(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeights, match=r"--download.*folder"):
        TextEncoder.from_pretrained("plip")
    with pytest.raises(MissingWeights, match="plip, clip"):
        TextEncoder.from_pretrained("no-such-thing")
