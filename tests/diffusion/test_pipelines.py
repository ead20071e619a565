"""The pipeline does what a diffusers user expects, and says what its numbers mean."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from pixcell.diffusion.conditioning import Conditioning
from pixcell.diffusion.pipelines import PixCellPipeline
from pixcell.diffusion.sampling import generator_for, make_scheduler
from pixcell.errors import MissingWeights, ModelError, WrongWeights

STEPS = 3


@pytest.fixture
def embeddings():
    return torch.randn(2, 2, 2, 12, generator=torch.Generator().manual_seed(0))


def latents_of(pipeline, embeddings, seed=0, **arguments):
    generator = torch.Generator().manual_seed(seed)
    return pipeline(
        embeddings, num_inference_steps=STEPS, generator=generator, output_type="latent", **arguments
    ).images


class TestSavedAndLoaded:
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
        for file in ("pixcell.json", "transformer/diffusion_pytorch_model.safetensors"):
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()

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
        with pytest.raises(MissingWeights, match=r"lacks config\.json or safetensors"):
            PixCellPipeline.from_pretrained(tmp_path)

    def test_weights_cut_short(self, pipeline, tmp_path):
        pipeline.save_pretrained(tmp_path)
        file = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(WrongWeights, match="cannot be loaded"):
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

    def test_programming_errors(self, pipeline, embeddings):
        with pytest.raises(ValueError, match="output_type 'jpg'"):
            pipeline(embeddings, output_type="jpg")
        with pytest.raises(ValueError, match="a callback can get"):
            pipeline(embeddings, callback_on_step_end_tensor_inputs=["noise"])


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
