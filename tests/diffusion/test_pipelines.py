"""The pipeline does what a diffusers user expects, and says what its numbers mean."""

import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline
from PIL import Image

from golden_vectors import load
from pixcell.diffusion.conditioning import Conditioning
from pixcell.diffusion.control import control_latents_of
from pixcell.diffusion.large_image import LargeImageScheduler
from pixcell.diffusion.pipelines import PixCellPipeline
from pixcell.diffusion.sampling import generator_for, make_scheduler, noise_for
from pixcell.errors import MissingWeights, ModelError, WrongWeights
from pixcell.models.controlnet import PixCellControlNetModel
from pixcell.models.transformer import PixCellTransformer2DModel
from tiny_models import awake, tiny_controlnet, tiny_kl_vae, tiny_transformer, tiny_vae

STEPS = 3


@pytest.fixture
def embeddings():
    return torch.randn(2, 2, 2, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mask():
    white = np.zeros((128, 128), bool)
    white[32:96, 16:80] = True
    return white


def latents_of(pipeline, embeddings, seed=0, **arguments):
    generator = torch.Generator().manual_seed(seed)
    return pipeline(
        embeddings, num_inference_steps=STEPS, generator=generator, output_type="latent", **arguments
    ).images


def contents(folder):
    """Every file of a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestSavedAndLoaded:
    @pytest.mark.parametrize("options", [{"variant": "fp16"}, {"safe_serialization": False}], ids=str)
    def test_what_would_not_be_read_back_is_not_written(self, pipeline, options, tmp_path):
        with pytest.raises(ModelError, match=r"folder of its own|safetensors"):
            pipeline.save_pretrained(tmp_path / "saved", **options)
        assert not (tmp_path / "saved").exists()

    def test_facts_of_a_model_saved_there_before_do_not_stay(self, pipeline, transformer, vae, tmp_path):
        pipeline.save_pretrained(tmp_path)
        PixCellPipeline(transformer, vae, make_scheduler()).save_pretrained(tmp_path)
        assert PixCellPipeline.from_pretrained(tmp_path).facts == {}

    def test_facts_are_there_when_parts_are_saved_and_uploaded(self, pipeline, tmp_path, monkeypatch):
        seen = []
        save = DiffusionPipeline.save_pretrained

        def watched(self, folder, **kwargs):
            seen.append((Path(folder) / "pixcell.json").is_file())
            save(self, folder, **kwargs)

        monkeypatch.setattr(DiffusionPipeline, "save_pretrained", watched)
        pipeline.save_pretrained(tmp_path)
        assert seen == [True]

    def test_the_scheduler_of_large_images_too(self, transformer, vae, tmp_path):
        PixCellPipeline(transformer, vae, LargeImageScheduler(eta=1.0)).save_pretrained(tmp_path)
        scheduler = PixCellPipeline.from_pretrained(tmp_path).scheduler
        assert isinstance(scheduler, LargeImageScheduler)
        assert scheduler.config.eta == 1.0

    def test_it_makes_the_same_pictures(self, pipeline, embeddings, tmp_path):
        pipeline.save_pretrained(tmp_path)
        again = PixCellPipeline.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert torch.equal(latents_of(again, embeddings), latents_of(pipeline, embeddings))
        assert again.facts == pipeline.facts
        settings = {key: value for key, value in pipeline.scheduler.config.items() if key[0] != "_"}
        assert {key: again.scheduler.config[key] for key in settings} == settings
        assert (again.codec.scale, again.codec.shift) == (pipeline.codec.scale, pipeline.codec.shift)

    def test_the_folder_is_the_diffusers_layout_and_stable(self, pipeline, tmp_path):
        pipeline.save_pretrained(tmp_path / "one")
        PixCellPipeline.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
        index = json.loads((tmp_path / "one/model_index.json").read_text())
        assert index["transformer"] == ["pixcell.models.transformer", "PixCellTransformer2DModel"]
        assert index["scheduler"] == ["diffusers", "DPMSolverMultistepScheduler"]
        assert contents(tmp_path / "one") == contents(tmp_path / "two")

    def test_custom_code_of_a_folder_is_never_run(self, pipeline, tmp_path):
        """Published pipelines name a module of their own for the transformer."""
        pipeline.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        index["transformer"] = ["pixcell_transformer_2d", "PixCellTransformer2DModel"]
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        (tmp_path / "transformer/pixcell_transformer_2d.py").write_text("raise SystemExit('run')")
        config = json.loads((tmp_path / "transformer/config.json").read_text())
        legacy = {"double_self_attention": False, "num_vector_embeds": None, "only_cross_attention": False}
        (tmp_path / "transformer/config.json").write_text(json.dumps(config | legacy))
        assert PixCellPipeline.from_pretrained(tmp_path).transformer.config.caption_num_tokens == 4

    def test_the_transformer_may_be_loaded_in_half_precision(self, pipeline, embeddings, tmp_path):
        pipeline.save_pretrained(tmp_path)
        half = PixCellPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
        half.set_progress_bar_config(disable=True)
        assert half.transformer.dtype == torch.bfloat16
        assert half.vae.dtype == torch.float32
        exact = latents_of(pipeline, embeddings)
        assert (latents_of(half, embeddings) - exact).abs().mean() < 0.1 * exact.abs().mean()

    def test_a_vae_kept_elsewhere_can_be_given(self, pipeline, tmp_path):
        pipeline.save_pretrained(tmp_path)
        shutil.rmtree(tmp_path / "vae")
        with pytest.raises(MissingWeights):
            PixCellPipeline.from_pretrained(tmp_path)
        assert PixCellPipeline.from_pretrained(tmp_path, vae=pipeline.vae).vae is pipeline.vae


class TestDamage:
    def test_no_pipeline(self, tmp_path):
        with pytest.raises(MissingWeights, match=r"holds no model_index\.json"):
            PixCellPipeline.from_pretrained(tmp_path)

    def test_another_pipeline(self, pipeline, tmp_path):
        pipeline.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
        with pytest.raises(ModelError, match="FluxPipeline, not a PixCellPipeline"):
            PixCellPipeline.from_pretrained(tmp_path)

    def test_weights_missing(self, pipeline, tmp_path):
        pipeline.save_pretrained(tmp_path)
        (tmp_path / "transformer/diffusion_pytorch_model.safetensors").unlink()
        with pytest.raises(MissingWeights, match="transformer holds no weights"):
            PixCellPipeline.from_pretrained(tmp_path)

    def test_weights_cut_short(self, pipeline, tmp_path):
        pipeline.save_pretrained(tmp_path)
        file = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(WrongWeights, match="cannot be read as weights"):
            PixCellPipeline.from_pretrained(tmp_path)

    def test_a_tensor_missing_or_foreign(self, pipeline, tmp_path):
        from safetensors.torch import load_file, save_file

        pipeline.save_pretrained(tmp_path)
        file = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
        state = load_file(file)
        state["foreign"] = state.pop("proj_out.bias")
        save_file(state, file, metadata={"format": "pt"})
        with pytest.raises(WrongWeights, match=r"(proj_out\.bias|foreign)"):
            PixCellPipeline.from_pretrained(tmp_path)

    def test_facts_of_another_model(self, pipeline, tmp_path):
        pipeline.save_pretrained(tmp_path)
        for facts, message in (
            ({"encoder": {"dim": 1536}}, "embeddings 1536 wide, its transformer takes 12"),
            ({"codec": {"latent_channels": 16}}, "16 channels, its transformer takes 4"),
            ({"field_size": 256}, "2 x 2 fields of 256 px are not a picture of 128 px"),
            ({"mpp": 0}, "mpp is 0"),
        ):
            (tmp_path / "pixcell.json").write_text(json.dumps(pipeline.facts | facts))
            with pytest.raises(ModelError, match=message):
                PixCellPipeline.from_pretrained(tmp_path)

    def test_a_published_folder_without_autoencoder_weights(self, pipeline, tmp_path):
        """PixCell-256 hosts the configuration alone."""
        pipeline.save_pretrained(tmp_path)
        (tmp_path / "vae/diffusion_pytorch_model.safetensors").unlink()
        with pytest.raises(MissingWeights, match=r"give vae='sd3\.5'"):
            PixCellPipeline.from_pretrained(tmp_path)
        tiny_vae().save_pretrained(tmp_path / "elsewhere")
        again = PixCellPipeline.from_pretrained(tmp_path, vae=tmp_path / "elsewhere")
        for name, tensor in again.vae.state_dict().items():
            assert torch.equal(tensor, pipeline.vae.state_dict()[name])

    def test_a_model_that_is_not_on_this_machine(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(MissingWeights, match="is not on this machine"):
            PixCellPipeline.from_pretrained("nobody-here/no-such-model")

    def test_a_branch_of_another_model(self, pipeline):
        for changes, message in (
            ({"sample_size": 8, "interpolation_scale": 0.25}, "its sample_size is 8 and not 16"),
            ({"caption_channels": 24}, "its caption_channels is 24 and not 12"),
            ({"num_layers": 9}, "8 blocks, more than 2"),
            ({"num_attention_heads": 4, "cross_attention_dim": 64}, "64 wide and not 32"),
        ):
            branch = PixCellControlNetModel.from_transformer(tiny_transformer(**changes))
            with pytest.raises(ModelError, match=message):
                PixCellPipeline(pipeline.transformer, pipeline.vae, pipeline.scheduler, controlnet=branch)

    def test_facts_that_are_no_json(self, pipeline, tmp_path):
        pipeline.save_pretrained(tmp_path)
        (tmp_path / "pixcell.json").write_text("{")
        with pytest.raises(ModelError, match="not valid JSON"):
            PixCellPipeline.from_pretrained(tmp_path)

    def test_a_scheduler_nobody_knows(self, pipeline, tmp_path):
        pipeline.save_pretrained(tmp_path)
        (tmp_path / "scheduler/scheduler_config.json").write_text('{"_class_name": "os"}')
        with pytest.raises(ModelError, match="names the scheduler 'os'"):
            PixCellPipeline.from_pretrained(tmp_path)


class TestCall:
    def test_output_types_are_the_same_picture(self, pipeline, embeddings):
        def made(output_type):
            generator = torch.Generator().manual_seed(4)
            return pipeline(
                embeddings, num_inference_steps=STEPS, generator=generator, output_type=output_type
            ).images

        tensors, arrays, pictures, latents = (made(kind) for kind in ("pt", "np", "pil", "latent"))
        assert tensors.shape == (2, 3, 128, 128)
        assert tensors.min() >= 0
        assert tensors.max() <= 1
        np.testing.assert_array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
        assert isinstance(pictures[1], Image.Image)
        assert np.abs(np.asarray(pictures[1]) - 255 * arrays[1]).max() <= 0.5
        assert latents.shape == (2, 4, 16, 16)
        torch.testing.assert_close(pipeline.codec.decode(latents), tensors)

    def test_tokens_grids_and_conditionings_are_the_same(self, pipeline, embeddings):
        ways = (embeddings, embeddings.flatten(1, 2), Conditioning(embeddings))
        one, *others = (latents_of(pipeline, way) for way in ways)
        assert all(torch.equal(one, other) for other in others)

    def test_a_generator_per_picture_makes_pictures_independent(self, pipeline, embeddings):
        def made(rows):
            return pipeline(
                embeddings[rows],
                num_inference_steps=STEPS,
                generator=[generator_for(1, row) for row in rows],
                output_type="latent",
                fixed_batch=1,
            ).images

        assert torch.equal(made([0, 1])[1:], made([1]))

    @pytest.mark.parametrize("fixed_batch", [1, 2])
    def test_a_guidance_scale_per_picture_holds_in_fixed_batches(self, pipeline, embeddings, fixed_batch):
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))

        def made(rows, guidance_scale):
            return latents_of(
                pipeline,
                embeddings[rows],
                latents=noise[rows],
                guidance_scale=guidance_scale,
                fixed_batch=fixed_batch,
            )

        together = made(slice(None), torch.tensor([1.5, 3.0]))
        for row, scale in enumerate((1.5, 3.0)):
            alone = made(slice(row, row + 1), scale)
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)

    def test_given_latents_are_the_start(self, pipeline, embeddings):
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        assert torch.equal(latents_of(pipeline, embeddings, latents=noise), latents_of(pipeline, embeddings))
        with pytest.raises(ModelError, match=r"these pictures need \(2, 4, 16, 16\)"):
            latents_of(pipeline, embeddings, latents=noise[:1])

    def test_several_pictures_of_one_embedding(self, pipeline, embeddings):
        made = latents_of(pipeline, embeddings, num_images_per_embedding=3)
        assert made.shape[0] == 6
        assert torch.equal(made, latents_of(pipeline, embeddings.repeat_interleave(3, 0)))

    def test_no_embeddings_means_no_condition(self, pipeline):
        made = latents_of(pipeline, None, num_images_per_embedding=2)
        null = pipeline.get_unconditional_embedding(2)
        torch.testing.assert_close(made, latents_of(pipeline, null, guidance_scale=1.0), rtol=1e-4, atol=1e-4)

    def test_the_callback_sees_and_may_change_every_step(self, pipeline, embeddings):
        seen = []

        def callback(pipe, step, timestep, tensors):
            assert pipe is pipeline
            seen.append((step, int(timestep)))
            return {"latents": torch.zeros_like(tensors["latents"])} if step == STEPS - 1 else {}

        made = latents_of(pipeline, embeddings, callback_on_step_end=callback)
        assert seen == [(0, 999), (1, 666), (2, 333)]
        assert not made.any()

    def test_progress_is_shown_unless_switched_off(self, pipeline, embeddings, capsys):
        latents_of(pipeline, embeddings)
        assert not capsys.readouterr().err
        pipeline.set_progress_bar_config(disable=False)
        latents_of(pipeline, embeddings)
        assert f"{STEPS}/{STEPS}" in capsys.readouterr().err

    def test_other_sizes_and_their_limits(self, pipeline, embeddings):
        made = pipeline(embeddings, num_inference_steps=1, height=64, width=96, output_type="pt").images
        assert made.shape == (2, 3, 64, 96)
        with pytest.raises(ModelError, match="72 x 64 pixels: both sides must be multiples of 16"):
            pipeline(embeddings, height=72, width=64)

    def test_other_schedulers_go_on_from_the_same_weights(self, pipeline, embeddings):
        one = latents_of(pipeline, embeddings)
        pipeline.scheduler = make_scheduler("ddim")
        other = latents_of(pipeline, embeddings)
        assert one.shape == other.shape
        assert not torch.equal(one, other)

    def test_tuple_output(self, pipeline, embeddings):
        (images,) = pipeline(embeddings, num_inference_steps=1, output_type="pt", return_dict=False)
        assert images.shape[0] == 2

    def test_dtype_moves(self, pipeline, embeddings):
        pipeline.to(torch.bfloat16)
        assert pipeline(embeddings, num_inference_steps=1, output_type="pt").images.dtype == torch.float32

    @pytest.mark.gpu
    def test_device_moves(self, pipeline, embeddings):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        assert latents_of(pipeline.to("cuda"), embeddings).device.type == "cuda"


class TestWrongInput:
    @pytest.fixture(autouse=True)
    def nothing_is_computed(self, pipeline):
        pipeline.transformer.register_forward_pre_hook(lambda *_: pytest.fail("computed"))

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((1, 2, 2, 13), "13 wide was given; the model takes 4 embedding"),
            ((1, 1, 1, 12), "a 1 x 1 grid of embeddings 12 wide"),
            ((1, 3, 12), "do not make a square grid"),
            ((4, 12), r"embeddings of shape \(4, 12\) were given"),
        ],
    )
    def test_embeddings_of_another_model(self, pipeline, shape, message):
        with pytest.raises(ModelError, match=message):
            pipeline(torch.zeros(shape))

    def test_nan(self, pipeline, embeddings):
        embeddings[1] = float("nan")
        with pytest.raises(ModelError, match=r"sample\(s\) 1 hold NaN"):
            pipeline(embeddings)

    @pytest.mark.parametrize("steps", [0, -1, 5000])
    def test_steps(self, pipeline, embeddings, steps):
        with pytest.raises(ModelError, match="choose 1 to 1000"):
            pipeline(embeddings, num_inference_steps=steps)

    def test_count(self, pipeline, embeddings):
        with pytest.raises(ModelError, match="0 pictures cannot be made"):
            pipeline(embeddings, num_images_per_embedding=0)

    def test_negative_embeddings_that_do_not_fit(self, pipeline, embeddings):
        with pytest.raises(ModelError, match="3 negative embeddings were given for 2 samples"):
            pipeline(embeddings, negative_embeddings=embeddings[[0, 1, 0]])
        with pytest.raises(ModelError, match="give both, or neither"):
            pipeline(None, negative_embeddings=embeddings)
        with pytest.raises(ModelError, match="13 wide was given"):
            pipeline(embeddings, negative_embeddings=torch.zeros(2, 2, 2, 13))

    def test_guidance(self, pipeline, embeddings):
        with pytest.raises(ModelError, match="3 guidance scales were given for 2 pictures"):
            pipeline(embeddings, guidance_scale=torch.ones(3))
        with pytest.raises(ModelError, match="guidance_scale is nan"):
            pipeline(embeddings, guidance_scale=float("nan"))
        with pytest.raises(ModelError, match="from a lower to a higher timestep"):
            pipeline(embeddings, guidance_interval=(800, 200))

    def test_generators(self, pipeline, embeddings):
        with pytest.raises(ModelError, match="3 generators were given for 2 pictures"):
            pipeline(embeddings, generator=[generator_for(0, index) for index in range(3)])

    def test_text(self, pipeline, embeddings):
        with pytest.raises(ModelError, match="the model takes embeddings of tissue"):
            pipeline(Conditioning(embeddings, text_states=torch.zeros(2, 5, 7)))

    def test_control_without_a_branch(self, pipeline, embeddings, mask):
        for given in ({"control": mask}, {"control": torch.zeros(1, 4, 16, 16)}):
            with pytest.raises(ModelError, match="the pipeline has no control branch"):
                pipeline(embeddings, **given)
        with pytest.raises(ModelError, match="the pipeline has no control branch"):
            pipeline(Conditioning(embeddings, control_latents=torch.zeros(2, 4, 16, 16)))

    def test_control_that_does_not_fit(self, pipeline, embeddings, mask):
        pipeline.controlnet = tiny_controlnet()
        pipeline.vae.register_forward_pre_hook(lambda *_: pytest.fail("computed"))
        for control, message in (
            (mask[:64], "is 64 x 128 pixels, the picture to be made 128 x 128"),
            (np.stack([mask] * 3), "3 control images were given for 2 samples"),
            (mask.astype(np.uint8), "brightest pixel"),
            (torch.zeros(1, 4, 16, 17), r"shape \(1, 4, 16, 17\)"),
        ):
            with pytest.raises(ModelError, match=message):
                pipeline(embeddings, control=control)
        with pytest.raises(ModelError, match=r"control_scale of shape \(3,\) was given for 2 pictures"):
            pipeline(embeddings, control=mask, control_scale=torch.ones(3))
        with pytest.raises(ModelError, match="control_scale is nan"):
            pipeline(embeddings, control=mask, control_scale=float("nan"))
        with pytest.raises(ModelError, match=r"control latents are \(4, 8, 8\)"):
            pipeline(Conditioning(embeddings, control_latents=torch.zeros(2, 4, 8, 8)))
        with pytest.raises(ModelError, match=r"control latents of sample\(s\) 0, 1 hold NaN"):
            pipeline(embeddings, control=torch.full((1, 4, 16, 16), float("nan")))
        with pytest.raises(ValueError, match="given twice"):
            pipeline(Conditioning(embeddings, control_latents=torch.zeros(2, 4, 16, 16)), control=mask)

    def test_programming_errors(self, pipeline, embeddings):
        with pytest.raises(ValueError, match="output_type 'jpg'"):
            pipeline(embeddings, output_type="jpg")
        with pytest.raises(ValueError, match="a callback can get"):
            pipeline(embeddings, callback_on_step_end_tensor_inputs=["noise"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((1, 2, 2, 12), np.float32), "in a ndarray"),
        ([torch.zeros(2, 2, 12)], "in a list"),
        (torch.zeros(0, 2, 2, 12), "0 embeddings"),
    ],
)
def test_embeddings_in_other_containers_are_refused(pipeline, given, message):
    as_users_call_it = inspect.unwrap(PixCellPipeline.__call__)  # tests check the types of arguments, too
    with pytest.raises(ModelError, match=message):
        as_users_call_it(pipeline, given)


def test_a_list_of_guidance_scales_is_one_per_picture(pipeline, embeddings):
    given = [
        latents_of(pipeline, embeddings, guidance_scale=scales, fixed_batch=1)
        for scales in ([1.5, 3.0], torch.tensor([1.5, 3.0]))
    ]
    assert torch.equal(*given)


def test_negative_embeddings_of_the_same_encoder_in_other_words(pipeline, embeddings):
    known = {**pipeline.facts["encoder"], "preprocessing": {"mean": (0.5,)}}
    from_file = json.loads(json.dumps({key: known[key] for key in ("sha256", "preprocessing")}))
    made = latents_of(
        pipeline,
        Conditioning(embeddings, encoder=known),
        negative_embeddings=Conditioning(-embeddings, encoder=from_file),
    )
    assert made.shape[0] == 2


def test_a_variance_that_was_not_learned_is_refused_before_the_mask_is_encoded(vae, mask, monkeypatch):
    transformer = tiny_transformer(out_channels=4)
    branch = PixCellControlNetModel.from_transformer(transformer)
    pipeline = PixCellPipeline(transformer, vae, make_scheduler("ddpm-learned"), controlnet=branch)
    monkeypatch.setattr(pipeline.codec, "encode", None)
    with pytest.raises(ModelError, match="has learned no variance"):
        pipeline(control=mask)


def test_a_scheduler_for_another_target_is_refused(transformer, vae, embeddings):
    """It would make pictures all the same, and wrong ones."""
    pipeline = PixCellPipeline(
        transformer, vae, make_scheduler("ddim", "velocity"), {"target": "velocity", "field_size": 64}
    )
    pipeline.set_progress_bar_config(disable=True)
    assert latents_of(pipeline, embeddings).isfinite().all()
    pipeline.scheduler = make_scheduler("ddim")
    with pytest.raises(ModelError, match="predicts the velocity"):
        latents_of(pipeline, embeddings)


def test_a_pipeline_without_facts_goes_by_its_own_scheduler(transformer, vae, embeddings):
    pipeline = PixCellPipeline(transformer, vae, make_scheduler())
    pipeline.scheduler = make_scheduler("ddim", "velocity")
    with pytest.raises(ModelError, match="predicts the noise"):
        latents_of(pipeline, embeddings)


@pytest.fixture
def controlled(transformer, vae, pipeline) -> PixCellPipeline:
    """The pipeline with a control branch."""
    made = PixCellPipeline(transformer, vae, make_scheduler(), pipeline.facts, tiny_controlnet())
    made.set_progress_bar_config(disable=True)
    return made


class TestControl:
    def test_a_mask_changes_the_picture_and_its_scale_how_much(self, controlled, embeddings, mask):
        plain = latents_of(controlled, embeddings)
        distances = [
            (latents_of(controlled, embeddings, control=mask, control_scale=scale) - plain).abs().mean()
            for scale in (0.0, 0.1, 1.0)
        ]
        assert distances[0] == 0
        assert 0 < distances[1] < distances[2]

    def test_a_branch_without_a_control_image_changes_nothing(self, controlled, pipeline, embeddings):
        assert torch.equal(latents_of(controlled, embeddings), latents_of(pipeline, embeddings))

    def test_pictures_arrays_tensors_and_latents_are_the_same_control(self, controlled, embeddings, mask):
        encoded = control_latents_of(controlled.codec, mask, 128, 128)
        forms = (mask, Image.fromarray(mask), torch.from_numpy(mask), encoded, encoded.expand(2, -1, -1, -1))
        one, *others = (latents_of(controlled, embeddings, control=form) for form in forms)
        assert all(torch.equal(one, other) for other in others)
        conditioning = Conditioning(embeddings, control_latents=encoded.expand(2, -1, -1, -1))
        assert torch.equal(latents_of(controlled, conditioning), one)

    def test_a_mask_for_each_sample_is_its_own(self, controlled, embeddings, mask):
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
        masks = np.stack([mask, ~mask])
        together = latents_of(controlled, embeddings, control=masks, latents=noise)
        for row in range(2):
            one = slice(row, row + 1)
            alone = latents_of(controlled, embeddings[one], control=masks[row], latents=noise[one])
            torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-4)

    def test_a_scale_for_each_picture_is_its_own(self, controlled, embeddings, mask):
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
        scales = torch.tensor([0.0, 1.0])
        together = latents_of(controlled, embeddings, control=mask, control_scale=scales, latents=noise)
        for row, scale in enumerate((0.0, 1.0)):
            one = slice(row, row + 1)
            alone = latents_of(
                controlled, embeddings[one], control=mask, control_scale=scale, latents=noise[one]
            )
            torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-4)

    def test_several_pictures_of_each_sample_share_its_mask(self, controlled, embeddings, mask):
        masks = np.stack([mask, ~mask])
        made = latents_of(controlled, embeddings, control=masks, num_images_per_embedding=2)
        expected = latents_of(controlled, embeddings.repeat_interleave(2, 0), control=masks.repeat(2, axis=0))
        assert torch.equal(made, expected)

    def test_masks_alone_make_as_many_pictures(self, controlled, mask):
        made = latents_of(controlled, None, control=np.stack([mask, ~mask]), guidance_scale=1.0)
        null = controlled.get_unconditional_embedding(2)
        assert made.shape[0] == 2
        with_null = latents_of(controlled, null, control=np.stack([mask, ~mask]), guidance_scale=1.0)
        torch.testing.assert_close(made, with_null, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("fixed_batch", [1, 2])
    def test_a_picture_does_not_depend_on_its_batch(self, controlled, embeddings, mask, fixed_batch):
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
        masks = np.stack([mask, ~mask])

        def made(rows):
            return latents_of(
                controlled,
                embeddings[rows],
                control=masks[rows],
                latents=noise[rows],
                fixed_batch=fixed_batch,
            )

        assert torch.equal(made([0, 1])[1:], made([1]))

    @pytest.mark.parametrize("fixed_batch", [1, 2])
    def test_a_picture_does_not_depend_on_the_control_of_others(self, vae, mask, fixed_batch):
        """The branch runs on those that have a control: how many there are must not matter."""
        torch.manual_seed(0)
        transformer = tiny_transformer(num_attention_heads=3, attention_head_dim=24, cross_attention_dim=72)
        branch = awake(PixCellControlNetModel.from_transformer(transformer))
        pipeline = PixCellPipeline(transformer, vae, make_scheduler(), controlnet=branch)
        pipeline.set_progress_bar_config(disable=True)
        embeddings = torch.randn(3, 2, 2, 12, generator=torch.Generator().manual_seed(0))

        def made(rows):
            return latents_of(
                pipeline,
                embeddings[rows],
                control=np.stack([mask] * len(rows)),
                control_scale=torch.tensor([1.0, 0.0, 0.5])[rows],
                guidance_scale=torch.tensor([1.5, 2.0, 3.0])[rows],
                latents=torch.cat([noise_for(0, row, (1, 4, 16, 16)) for row in rows]),
                fixed_batch=fixed_batch,
            )

        whole = made([0, 1, 2])
        assert all(torch.equal(made([row])[0], whole[row]) for row in range(3))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, controlled, embeddings, mask, dtype):
        """The published control pipeline forces float32 on the mask, and breaks here."""
        exact = latents_of(controlled, embeddings, control=mask)
        half = latents_of(controlled.to(dtype), embeddings, control=mask)
        assert controlled.controlnet.dtype == dtype
        assert (half - exact).abs().mean() < 0.15 * exact.abs().mean()

    def test_saved_and_loaded(self, controlled, embeddings, mask, tmp_path):
        controlled.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["controlnet"] == ["pixcell.models.controlnet", "PixCellControlNetModel"]
        again = PixCellPipeline.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert torch.equal(
            latents_of(again, embeddings, control=mask), latents_of(controlled, embeddings, control=mask)
        )
        again.save_pretrained(tmp_path / "again")
        first = {name: data for name, data in contents(tmp_path).items() if not name.startswith("again/")}
        assert contents(tmp_path / "again") == first

    def test_a_branch_may_come_from_elsewhere(self, pipeline, controlled, embeddings, mask, tmp_path):
        pipeline.save_pretrained(tmp_path / "base")
        controlled.controlnet.save_pretrained(tmp_path / "branch")
        expected = latents_of(controlled, embeddings, control=mask)
        for controlnet in (tmp_path / "branch", controlled.controlnet):
            loaded = PixCellPipeline.from_pretrained(tmp_path / "base", controlnet=controlnet)
            loaded.set_progress_bar_config(disable=True)
            assert torch.equal(latents_of(loaded, embeddings, control=mask), expected)

    def test_the_published_layout_is_read_and_its_code_is_not_run(self, controlled, tmp_path):
        controlled.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        index |= {
            "_class_name": "PixCellControlNetPipeline",
            "controlnet": ["pixcell_controlnet", "PixCellControlNet"],
            "transformer": ["pixcell_controlnet_transformer", "PixCellTransformer2DModelControlNet"],
        }
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        (tmp_path / "pixcell.json").unlink()
        for part in ("controlnet", "transformer"):
            config = json.loads((tmp_path / part / "config.json").read_text())
            config["_class_name"] = index[part][1]
            (tmp_path / part / "config.json").write_text(json.dumps(config))
            (tmp_path / part / f"{index[part][0]}.py").write_text("raise SystemExit('run')")
        again = PixCellPipeline.from_pretrained(tmp_path)
        for name, tensor in again.controlnet.state_dict().items():
            assert torch.equal(tensor, controlled.controlnet.state_dict()[name])

    def test_components_make_the_same_pipeline(self, controlled, pipeline):
        assert set(controlled.components) == {"transformer", "vae", "scheduler", "controlnet"}
        assert PixCellPipeline(**controlled.components).controlnet is controlled.controlnet
        assert PixCellPipeline(**pipeline.components).controlnet is None
        given = PixCellPipeline.from_pipe(pipeline, controlnet=controlled.controlnet)
        assert given.controlnet is controlled.controlnet
        assert (given.transformer, given.facts) == (pipeline.transformer, pipeline.facts)


class TestPublishedSampling:
    """The pipeline as a whole walks the published pipelines' way, every step."""

    def walked(self, tensors, case, steps, **arguments):
        kinds = {"transformer": PixCellTransformer2DModel, "controlnet": PixCellControlNetModel}
        models = {}
        for name, kind in kinds.items():
            config = case["config"].get(name)
            if config is not None:
                models[name] = part_of(tensors, kind(**config), f"w.{name}.")
        if not models:
            models["transformer"] = part_of(tensors, PixCellTransformer2DModel(**case["config"]), "w.")
        pipeline = PixCellPipeline(vae=tiny_vae(), scheduler=make_scheduler(), **models)
        pipeline.set_progress_bar_config(disable=True)
        trajectory = []
        pipeline(
            tensors["in.uni_embeds"],
            latents=tensors["in.noise"],
            num_inference_steps=steps,
            guidance_scale=case["settings"]["guidance"],
            output_type="latent",
            callback_on_step_end=lambda _p, _n, _t, given: trajectory.append(given["latents"].clone()),
            **arguments,
        )
        return torch.stack(trajectory)

    @pytest.mark.parametrize("steps", [20, 5])
    def test_from_embeddings(self, steps):
        tensors, case = load("hf_pipeline_sampling")
        trajectory = self.walked(tensors, case, steps)
        torch.testing.assert_close(trajectory, tensors[f"out.trajectory_{steps}"], rtol=1e-3, atol=1e-3)

    def test_with_a_mask(self):
        tensors, case = load("controlnet_sampling")
        trajectory = self.walked(tensors, case, case["settings"]["steps"], control=tensors["in.conditioning"])
        torch.testing.assert_close(trajectory, tensors["out.trajectory"], rtol=1e-3, atol=1e-3)


def part_of(tensors, model, prefix):
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    model.load_state_dict(state, strict=True)
    return model.eval()


class TestGuidance:
    def test_null_embeddings_given_as_negative_ones_change_nothing(self, pipeline, embeddings):
        null = pipeline.get_unconditional_embedding()
        one = latents_of(pipeline, embeddings, guidance_scale=2.0)
        for negative in (null, null.expand(2, -1, -1)):
            other = latents_of(pipeline, embeddings, guidance_scale=2.0, negative_embeddings=negative)
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("fixed_batch", [None, 1])
    def test_guidance_moves_away_from_negative_embeddings(self, pipeline, embeddings, fixed_batch):
        """At scale 0 what is left is the negative branch."""
        made = latents_of(
            pipeline,
            embeddings,
            guidance_scale=0.0,
            negative_embeddings=embeddings.flip(0),
            fixed_batch=fixed_batch,
        )
        alone = latents_of(pipeline, embeddings.flip(0), guidance_scale=1.0, fixed_batch=fixed_batch)
        torch.testing.assert_close(made, alone, rtol=1e-4, atol=1e-4)

    def test_negative_embeddings_follow_their_sample_to_its_pictures(self, pipeline, embeddings):
        made = latents_of(
            pipeline,
            embeddings,
            guidance_scale=0.0,
            negative_embeddings=embeddings.flip(0),
            num_images_per_embedding=2,
        )
        expected = latents_of(pipeline, embeddings.flip(0).repeat_interleave(2, 0), guidance_scale=1.0)
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)

    def test_the_negative_branch_has_no_control(self, controlled, embeddings, mask):
        made = latents_of(
            controlled, embeddings, guidance_scale=0.0, negative_embeddings=embeddings, control=mask
        )
        plain = latents_of(controlled, embeddings, guidance_scale=1.0)
        torch.testing.assert_close(made, plain, rtol=1e-4, atol=1e-4)

    def test_outside_of_its_interval_guidance_is_off(self, pipeline, embeddings):
        off = latents_of(pipeline, embeddings, guidance_scale=1.0)
        never = latents_of(pipeline, embeddings, guidance_scale=3.0, guidance_interval=(100, 200))
        assert torch.equal(never, off)
        always = latents_of(pipeline, embeddings, guidance_scale=3.0, guidance_interval=(0, 999))
        assert torch.equal(always, latents_of(pipeline, embeddings, guidance_scale=3.0))
        assert not torch.allclose(always, off)

    def test_the_scale_is_the_saved_one_or_the_published_best(self, pipeline, transformer, vae, embeddings):
        assert pipeline.usual_guidance_scale == 2.0
        pipeline.facts["guidance_scale"] = 1.3
        assert torch.equal(
            latents_of(pipeline, embeddings), latents_of(pipeline, embeddings, guidance_scale=1.3)
        )
        large = tiny_transformer(caption_num_tokens=16)
        assert PixCellPipeline(large, vae, make_scheduler()).usual_guidance_scale == 1.2


class TestEncoder:
    """Embeddings of another encoder have the right width and no meaning."""

    @pytest.mark.parametrize(
        "other",
        [
            {"name": "small", "sha256": "f" * 64},
            {"name": "other"},
            {"sha256": "0" * 64, "preprocessing": {"mean": [0.5, 0.5, 0.5]}},
        ],
    )
    def test_another_encoder_is_refused(self, pipeline, embeddings, other):
        pipeline.facts["encoder"]["preprocessing"] = {"mean": [0.0, 0.0, 0.0]}
        for given in (
            {"embeddings": embeddings, "encoder": other},
            {"embeddings": Conditioning(embeddings, encoder=other)},
            {"embeddings": embeddings, "negative_embeddings": Conditioning(embeddings, encoder=other)},
        ):
            with pytest.raises(ModelError, match="the model was trained with small"):
                pipeline(**given)

    @pytest.mark.parametrize(
        "same",
        [
            {"name": "called otherwise", "sha256": "0" * 64},
            {"name": "small"},
            {"dim": 12},
            {"sha256": "0" * 64, "preprocessing": {"mean": (0.0, 0.0, 0.0)}},
        ],
    )
    def test_its_own_is_taken_whatever_it_is_called(self, pipeline, embeddings, same):
        pipeline.facts["encoder"]["preprocessing"] = {"mean": [0.0, 0.0, 0.0]}
        made = latents_of(pipeline, embeddings, encoder=same)
        assert torch.equal(made, latents_of(pipeline, embeddings))

    def test_where_the_model_does_not_say_all_are_taken(self, transformer, vae, embeddings):
        pipeline = PixCellPipeline(transformer, vae, make_scheduler())
        pipeline.set_progress_bar_config(disable=True)
        assert latents_of(pipeline, embeddings, encoder={"name": "any", "sha256": "f" * 64}).isfinite().all()


class TestPlaces:
    def test_parts_are_brought_to_where_they_compute(self, controlled, embeddings, mask):
        """CPU offload, with the CPU for the accelerator: what is tested is that every part is called up."""
        expected = [np.asarray(picture) for picture in images_of(controlled, embeddings, control=mask)]
        controlled.enable_model_cpu_offload(device="cpu")
        called = []
        for name in ("transformer", "vae", "controlnet"):
            hook = getattr(controlled, name)._hf_hook
            pre_forward = hook.pre_forward

            def called_up(module, *args, _name=name, _pre_forward=pre_forward, **kwargs):
                called.append(_name)
                return _pre_forward(module, *args, **kwargs)

            hook.pre_forward = called_up
        for one, other in zip(expected, images_of(controlled, embeddings, control=mask), strict=True):
            assert np.array_equal(one, np.asarray(other))
        assert set(called) == {"transformer", "vae", "controlnet"}
        assert called[0] == "vae"  # for the mask, before the first step
        assert called[-1] == "vae"

    def test_weights_may_be_kept_elsewhere_layer_by_layer(self, controlled, embeddings, mask):
        """What enable_sequential_cpu_offload does, with the CPU for the accelerator."""
        expected = latents_of(controlled, embeddings, control=mask)
        unconditional = latents_of(controlled, None)
        for name in ("transformer", "vae", "controlnet"):
            cpu_offload(getattr(controlled, name), torch.device("cpu"), offload_buffers=True)
        assert controlled.transformer.device.type == "meta"
        # nothing is prepared ahead now, which rounds otherwise; latents of a random model reach hundreds
        close = {"rtol": 1e-4, "atol": 1e-3}
        torch.testing.assert_close(latents_of(controlled, embeddings, control=mask), expected, **close)
        torch.testing.assert_close(latents_of(controlled, None), unconditional, **close)

    def test_an_autoencoder_that_needs_range_stays_in_float32(self, transformer, embeddings):
        vae = tiny_kl_vae(force_upcast=True)
        pipeline = PixCellPipeline(transformer, vae, make_scheduler())
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(torch.float16)
        assert (pipeline.transformer.dtype, pipeline.vae.dtype) == (torch.float16, torch.float32)
        pictures = pipeline(embeddings, num_inference_steps=1, output_type="pt").images
        assert pictures.isfinite().all()


def images_of(pipeline, embeddings, **arguments):
    generator = torch.Generator().manual_seed(0)
    return pipeline(embeddings, num_inference_steps=STEPS, generator=generator, **arguments).images
