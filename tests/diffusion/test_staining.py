"""Staining is translation, then sampling; nothing else happens on the way."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from PIL import Image

from pixcell.diffusion.conditioning import Conditioning
from pixcell.diffusion.denoisers import denoiser_of
from pixcell.diffusion.pipelines import PixCellPipeline
from pixcell.diffusion.sampling import generator_for, make_scheduler
from pixcell.diffusion.staining import LORA_FILE, VirtualStainingPipeline
from pixcell.errors import MissingWeights, ModelError, WrongWeights
from pixcell.models.adapters import add_lora, lora_state, merge_lora
from pixcell.models.encoders import load_encoder
from pixcell.models.translator import EmbeddingTranslator
from tiny_models import awake, tiny_transformer, tiny_vae

STEPS = 2


def adapted_transformer(**changes):
    transformer = tiny_transformer(**changes)
    add_lora(transformer)
    generator = torch.Generator().manual_seed(1)
    for value in lora_state(transformer).values():
        value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return transformer


def tiny_translator(width=12):
    torch.manual_seed(2)
    return awake(EmbeddingTranslator(width, 16, 16, 8, width, 2))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline():
    """Of embeddings 12 wide: pictures of 128 px with 2 x 2 fields."""
    facts = {"stain": "HER2", "encoder": {"name": "small", "dim": 12, "sha256": "0" * 64}, "field_size": 64}
    parts = (adapted_transformer(), tiny_vae(), make_scheduler(), tiny_translator())
    return quiet(VirtualStainingPipeline(*parts, facts=facts))


@pytest.fixture
def seeing():
    """A pipeline with an encoder, so that it takes pictures."""
    encoder = load_encoder("stain-texture")
    facts = {"encoder": encoder.made_by(), "field_size": 64, "mpp": 0.5}
    transformer = adapted_transformer(caption_channels=encoder.dim)
    translator = tiny_translator(encoder.dim)
    parts = (transformer, tiny_vae(), make_scheduler(), translator)
    return quiet(VirtualStainingPipeline(*parts, facts=facts, encoder=encoder))


@pytest.fixture
def embeddings():
    return torch.randn(2, 2, 2, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pictures():
    return torch.randint(0, 256, (2, 3, 128, 128), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def latents_of(pipeline, source, **arguments):
    return pipeline(
        source,
        **{"num_translation_steps": 2, "num_inference_steps": STEPS, "output_type": "latent"}
        | {"generator": torch.Generator().manual_seed(0)}
        | arguments,
    ).images


class TestCall:
    def test_it_is_sampling_from_translated_embeddings(self, pipeline, embeddings):
        translated = pipeline.translator.translate(embeddings, num_steps=2)
        plain = PixCellPipeline(pipeline.transformer, pipeline.vae, pipeline.scheduler)
        generator = torch.Generator().manual_seed(0)
        sampled = quiet(plain)(
            translated,
            num_inference_steps=STEPS,
            guidance_scale=1.2,
            generator=generator,
            output_type="latent",
        ).images
        assert torch.equal(latents_of(pipeline, embeddings), sampled)

    def test_grids_tokens_and_conditionings_are_the_same(self, pipeline, embeddings):
        one = latents_of(pipeline, embeddings)
        for same in (embeddings.flatten(1, 2), Conditioning(embeddings)):
            assert torch.equal(latents_of(pipeline, same), one)

    def test_adapter_and_translator_both_matter(self, pipeline, embeddings):
        stained = latents_of(pipeline, embeddings)
        pipeline.transformer.disable_adapters()
        assert not torch.allclose(latents_of(pipeline, embeddings), stained, atol=1e-2)
        pipeline.transformer.enable_adapters()
        assert torch.equal(latents_of(pipeline, embeddings), stained)
        for parameter in pipeline.translator.out.parameters():
            parameter.data.zero_()
        assert not torch.allclose(latents_of(pipeline, embeddings), stained, atol=1e-2)

    def test_merged_adapters_stain_the_same(self, pipeline, embeddings):
        stained = latents_of(pipeline, embeddings)
        merge_lora(pipeline.transformer)
        torch.testing.assert_close(latents_of(pipeline, embeddings), stained, rtol=1e-3, atol=1e-3)

    def test_a_generator_per_picture_makes_pictures_independent(self, pipeline, embeddings):
        def made(rows):
            generators = [generator_for(1, row) for row in rows]
            return latents_of(pipeline, embeddings[rows], generator=generators, fixed_batch=1)

        torch.testing.assert_close(made([0, 1])[1:], made([1]), rtol=1e-3, atol=1e-4)

    def test_options_are_those_of_every_pipeline(self, pipeline, embeddings):
        seen = []

        def callback(pipe, step, timestep, tensors):
            seen.append((pipe is pipeline, step))
            return {}

        images = pipeline(
            embeddings,
            num_translation_steps=2,
            num_inference_steps=STEPS,
            num_images_per_embedding=2,
            callback_on_step_end=callback,
            output_type="np",
            return_dict=False,
        )[0]
        assert images.shape == (4, 128, 128, 3)
        assert seen == [(True, step) for step in range(STEPS)]
        (picture,) = pipeline(embeddings[:1], num_translation_steps=1, num_inference_steps=1).images
        assert isinstance(picture, Image.Image)

    def test_one_denoiser_notices_that_the_adapter_is_switched(self, pipeline, embeddings):
        """What a denoiser has computed once, it computes anew for other weights."""
        denoiser = denoiser_of(pipeline.transformer)
        latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        arguments = (latents, torch.tensor(500.0), Conditioning(embeddings))
        with torch.no_grad():
            adapted = denoiser(*arguments)
            pipeline.transformer.disable_adapters()
            base = denoiser(*arguments)
            plain = denoiser_of(tiny_transformer())(*arguments)
            pipeline.transformer.enable_adapters()
            pipeline.transformer.set_adapters("default", weights=0.5)
            half = denoiser(*arguments)
        torch.testing.assert_close(base, plain)
        assert (adapted - base).abs().max() > 0.01
        assert (adapted - half).abs().max() > 0.01

    def test_keep_norm_reaches_the_translator(self, pipeline, embeddings):
        kept = pipeline.translated(embeddings, num_translation_steps=2, keep_norm=True).embedding_grid
        torch.testing.assert_close(
            kept, pipeline.translator.translate(embeddings, num_steps=2, keep_norm=True)
        )

    def test_half_precision(self, pipeline, embeddings):
        exact = latents_of(pipeline, embeddings)
        pipeline.translator.to(torch.bfloat16)
        pipeline.transformer.to(torch.bfloat16)
        half = latents_of(pipeline, embeddings)
        assert (half - exact).abs().mean() < 0.1 * exact.abs().mean()

    @pytest.mark.gpu
    def test_device_moves_and_cpu_offload(self, seeing, pictures):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        on_cpu = latents_of(seeing, pictures)
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        moved = latents_of(seeing.to("cuda"), pictures, latents=noise)
        assert moved.device.type == "cuda"
        torch.testing.assert_close(moved.cpu(), on_cpu, rtol=1e-2, atol=1e-2)
        seeing.to("cpu")
        seeing.enable_model_cpu_offload()
        torch.testing.assert_close(
            latents_of(seeing, pictures, latents=noise).cpu(), on_cpu, rtol=1e-2, atol=1e-2
        )


class TestPlaces:
    def test_parts_are_brought_to_where_they_compute(self, pipeline, embeddings):
        """CPU offload, with the CPU for the accelerator: what is tested is the order of the parts."""
        expected = latents_of(pipeline, embeddings, output_type="pt")
        pipeline.enable_model_cpu_offload(device="cpu")
        called = []
        for name in ("translator", "transformer", "vae"):
            hook = getattr(pipeline, name)._hf_hook

            def called_up(module, *args, _name=name, _pre_forward=hook.pre_forward, **kwargs):
                called.append(_name)
                return _pre_forward(module, *args, **kwargs)

            hook.pre_forward = called_up
        assert torch.equal(latents_of(pipeline, embeddings, output_type="pt"), expected)
        assert list(dict.fromkeys(called)) == ["translator", "transformer", "vae"]

    def test_weights_may_be_kept_elsewhere_layer_by_layer(self, pipeline, embeddings):
        expected = latents_of(pipeline, embeddings)
        for name in ("translator", "transformer"):
            cpu_offload(getattr(pipeline, name), torch.device("cpu"), offload_buffers=True)
        assert pipeline.translator.device.type == "meta"
        # nothing is prepared ahead now, which rounds otherwise
        torch.testing.assert_close(latents_of(pipeline, embeddings), expected, rtol=1e-4, atol=1e-3)


class TestPictures:
    def test_they_are_encoded_field_by_field(self, seeing, pictures):
        grid = seeing.embeddings_of(pictures)
        assert grid.shape == (2, 2, 2, 128)
        assert torch.equal(grid[1, 0, 1], seeing.encoder(pictures[1:, :, :64, 64:])[0])
        torch.testing.assert_close(latents_of(seeing, pictures), latents_of(seeing, grid))

    def test_every_kind_of_picture_is_the_same_picture(self, seeing, pictures):
        arrays = pictures.permute(0, 2, 3, 1).numpy()
        as_pil = [Image.fromarray(array) for array in arrays]
        grid = seeing.embeddings_of(pictures)
        for same in (arrays, as_pil, tuple(as_pil)):
            assert torch.equal(seeing.embeddings_of(same), grid)
        for one in (arrays[0], as_pil[0], pictures[0], as_pil[0].convert("RGBA")):
            assert torch.equal(seeing.embeddings_of(one), grid[:1])

    def test_a_real_picture_goes_all_the_way(self, seeing, shared_data):
        """Through random models: that it runs on real H&E is all that is shown here."""
        file = sorted((shared_data / "brca_m2c" / "images").glob("*.jpg"))[0]
        with Image.open(file) as image:
            crop = image.convert("RGB").crop((300, 300, 428, 428))
        (picture,) = seeing(crop, num_translation_steps=2, num_inference_steps=STEPS).images
        assert picture.size == (128, 128)
        assert np.asarray(picture).std() > 0


class TestSavedAndLoaded:
    def test_it_stains_the_same(self, pipeline, embeddings, tmp_path):
        pipeline.save_pretrained(tmp_path)
        again = quiet(VirtualStainingPipeline.from_pretrained(tmp_path))
        assert torch.equal(latents_of(again, embeddings), latents_of(pipeline, embeddings))
        assert again.facts == pipeline.facts

    def test_the_denoiser_is_saved_under_its_plain_names(self, pipeline, tmp_path):
        """So that the folder's transformer opens anywhere, and one base can serve many stains."""
        pipeline.save_pretrained(tmp_path)
        plain = tiny_transformer().__class__.from_pretrained(tmp_path / "transformer")
        original = tiny_transformer().state_dict()
        assert plain.state_dict().keys() == original.keys()
        assert all(torch.equal(value, original[name]) for name, value in plain.state_dict().items())
        assert (tmp_path / LORA_FILE).is_file()
        assert len(pipeline.transformer.state_dict()) > len(original)

    def test_saving_again_writes_the_same_bytes(self, pipeline, tmp_path):
        pipeline.save_pretrained(tmp_path / "one")
        VirtualStainingPipeline.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
        files = {
            file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*") if file.is_file()
        }
        assert Path(LORA_FILE) in files
        assert Path("translator/config.json") in files
        for file in files:
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file

    def test_merged_it_has_no_adapter(self, pipeline, embeddings, tmp_path):
        merge_lora(pipeline.transformer)
        pipeline.save_pretrained(tmp_path)
        assert not (tmp_path / LORA_FILE).exists()
        again = quiet(VirtualStainingPipeline.from_pretrained(tmp_path))
        assert torch.equal(latents_of(again, embeddings), latents_of(pipeline, embeddings))

    def test_merged_it_leaves_no_older_adapter_behind(self, pipeline, embeddings, tmp_path):
        pipeline.save_pretrained(tmp_path)
        merge_lora(pipeline.transformer)
        pipeline.save_pretrained(tmp_path)
        again = quiet(VirtualStainingPipeline.from_pretrained(tmp_path))
        assert torch.equal(latents_of(again, embeddings), latents_of(pipeline, embeddings))

    def test_parts_can_be_given(self, pipeline, embeddings, tmp_path):
        pipeline.save_pretrained(tmp_path)
        parts = {name: getattr(pipeline, name) for name in ("transformer", "vae", "scheduler", "translator")}
        again = quiet(VirtualStainingPipeline.from_pretrained(tmp_path, **parts))
        assert all(getattr(again, name) is part for name, part in parts.items())
        assert torch.equal(latents_of(again, embeddings), latents_of(pipeline, embeddings))

    def test_in_half_precision(self, pipeline, tmp_path):
        pipeline.save_pretrained(tmp_path)
        half = VirtualStainingPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
        assert half.transformer.dtype == torch.bfloat16
        assert half.translator.dtype == torch.float32  # small, and its errors add up over a hundred steps
        assert half.vae.dtype == torch.float32

    def test_the_encoder_comes_from_outside(self, seeing, pictures, tmp_path):
        seeing.save_pretrained(tmp_path)
        again = quiet(VirtualStainingPipeline.from_pretrained(tmp_path, encoder=seeing.encoder))
        assert torch.equal(latents_of(again, pictures), latents_of(seeing, pictures))

    def test_several_adapters_are_no_stain(self, pipeline, tmp_path):
        add_lora(pipeline.transformer, name="second")
        with pytest.raises(ModelError, match=r"2 adapters \(default, second\)"):
            pipeline.save_pretrained(tmp_path)
        assert not any(tmp_path.iterdir())


class TestDamage:
    @pytest.fixture
    def folder(self, pipeline, tmp_path):
        pipeline.save_pretrained(tmp_path)
        return tmp_path

    def test_another_pipeline(self, folder):
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "PixCellPipeline"}))
        with pytest.raises(ModelError, match="not a VirtualStainingPipeline"):
            VirtualStainingPipeline.from_pretrained(folder)

    def test_no_staining_pipeline_opens_as_a_plain_one(self, folder):
        """It would lose translator and adapter in silence."""
        with pytest.raises(ModelError, match="VirtualStainingPipeline"):
            PixCellPipeline.from_pretrained(folder)

    def test_no_translator(self, folder):
        (folder / "translator" / "diffusion_pytorch_model.safetensors").unlink()
        with pytest.raises(MissingWeights):
            VirtualStainingPipeline.from_pretrained(folder)

    def test_an_adapter_cut_short(self, folder):
        file = folder / LORA_FILE
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(WrongWeights, match="cannot be read"):
            VirtualStainingPipeline.from_pretrained(folder)

    def test_the_adapter_of_another_denoiser(self, folder):
        other = tiny_transformer()
        other.proj_out.bias.data += 1e-3
        other.save_pretrained(folder / "transformer")
        with pytest.raises(WrongWeights, match="was trained on the denoiser with sha256"):
            VirtualStainingPipeline.from_pretrained(folder)


class TestWrongInput:
    @pytest.fixture(autouse=True)
    def nothing_is_computed(self, pipeline, seeing):
        for part in (pipeline.transformer, pipeline.translator, seeing.transformer, seeing.translator):
            part.register_forward_pre_hook(lambda *_: pytest.fail("computed"))
        seeing.encoder.module.register_forward_pre_hook(lambda *_: pytest.fail("encoded"))

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (torch.zeros(1, 2, 2, 13), "13 wide"),
            (torch.zeros(1, 1, 1, 12), "1 x 1 grid"),
            (torch.zeros(1, 3, 12), "square grid"),
            (torch.full((1, 2, 2, 12), float("nan")), "NaN"),
            (Conditioning(), "no embeddings to translate"),
            (None, "no embeddings to translate"),
            (torch.zeros(1, 3, 128, 128, dtype=torch.uint8), "the pipeline has no encoder"),
        ],
    )
    def test_sources(self, pipeline, source, message):
        with pytest.raises(ModelError, match=message):
            pipeline(source)

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (torch.zeros(1, 3, 256, 256, dtype=torch.uint8), "128 x 128 pixels at 0.5 microns"),
            (torch.zeros(1, 1, 128, 128, dtype=torch.uint8), "128 x 128 pixels"),
            (np.zeros((128, 128, 3), np.float32), "Pictures are uint8"),
            (np.zeros((128, 128), np.uint8), "Pictures are uint8"),
            (Image.new("L", (128, 128)), "mode 'L'"),
            ([Image.new("RGB", (128, 128)), Image.new("RGB", (64, 64))], "equally large"),
            ([], "no picture"),
        ],
    )
    def test_pictures(self, seeing, source, message):
        with pytest.raises(ModelError, match=message):
            seeing(source)

    @pytest.mark.parametrize(
        "steps", [{"num_inference_steps": 0}, {"num_translation_steps": 0}, {"num_translation_steps": -1}]
    )
    def test_steps(self, seeing, pictures, steps):
        with pytest.raises(ModelError, match="not possible"):
            seeing(pictures, **steps)

    def test_another_encoder(self, pipeline, seeing):
        """Of another width, or with other weights."""
        parts = (pipeline.transformer, pipeline.vae, pipeline.scheduler, pipeline.translator)
        with pytest.raises(ModelError, match="makes embeddings 128 wide, the model takes 12"):
            VirtualStainingPipeline(*parts, encoder=seeing.encoder)
        seeing.facts["encoder"] = seeing.facts["encoder"] | {"sha256": "f" * 64, "name": "uni2-h"}
        with pytest.raises(ModelError, match="trained with uni2-h"):
            seeing(torch.zeros(1, 3, 128, 128, dtype=torch.uint8))

    def test_embeddings_of_another_encoder(self, pipeline, embeddings):
        made_by = {"name": "other", "dim": 12, "sha256": "1" * 64}
        with pytest.raises(ModelError, match="other"):
            pipeline(Conditioning(embeddings, encoder=made_by))

    def test_a_translator_of_another_width(self, pipeline):
        with pytest.raises(ModelError, match="embeddings 8 wide into 8, the denoiser takes 12"):
            VirtualStainingPipeline(
                pipeline.transformer, pipeline.vae, pipeline.scheduler, tiny_translator(8)
            )


def test_a_pipeline_of_the_same_parts_keeps_its_encoder(seeing, pictures):
    again = quiet(VirtualStainingPipeline.from_pipe(seeing))
    assert again.encoder is seeing.encoder
    assert torch.equal(latents_of(again, pictures), latents_of(seeing, pictures))
    plain = PixCellPipeline.from_pipe(seeing)  # without the parts that it does not take
    assert plain.transformer is seeing.transformer


@pytest.mark.parametrize(
    "wrong",
    [
        {"output_type": "jpg"},
        {"height": 100},
        {"guidance_scale": float("nan")},
        {"guidance_interval": (800, 200), "guidance_scale": 2.0},
        {"generator": [torch.Generator()] * 7},
        {"latents": torch.zeros(1, 4, 2, 2)},
    ],
    ids=str,
)
def test_what_is_wrong_is_said_before_anything_is_translated(seeing, pictures, wrong, monkeypatch):
    monkeypatch.setattr(seeing, "translated", None)
    with pytest.raises((ModelError, ValueError)):
        seeing(pictures, **wrong)


def test_the_adapter_is_there_when_parts_are_saved_and_uploaded(pipeline, tmp_path, monkeypatch):
    seen = []
    save = PixCellPipeline.save_pretrained

    def watched(self, folder, **kwargs):
        seen.append((Path(folder) / LORA_FILE).is_file())
        save(self, folder, **kwargs)

    monkeypatch.setattr(PixCellPipeline, "save_pretrained", watched)
    pipeline.save_pretrained(tmp_path)
    assert seen == [True]
