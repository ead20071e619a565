"""A text pipeline behaves as a diffusers user expects, and says what it cannot do before it computes."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pixcell.diffusion.conditioning import Conditioning
from pixcell.diffusion.noise_schedules import PATHLDM_SCHEDULE
from pixcell.diffusion.sampling import generator_for, make_scheduler
from pixcell.diffusion.schedulers import pathldm_scheduler
from pixcell.diffusion.text_pipeline import TextPipeline, text_denoiser_of
from pixcell.errors import MissingWeights, ModelError, WrongWeights
from pixcell.models.pathldm import ClassEmbedder
from tiny_models import awake
from tiny_pathldm import WIDTH, tiny_first_stage, tiny_text_tower, tiny_tokenizer, tiny_unet

STEPS = 5
PROMPTS = ["high tumor; low til; a", "low tumor; high til; b"]


@pytest.fixture(scope="module")
def parts():
    return {
        "unet": tiny_unet(),
        "vae": tiny_first_stage(),
        "text_encoder": tiny_text_tower(),
        "tokenizer": tiny_tokenizer(),
    }


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(parts):
    return quiet(TextPipeline(**parts, scheduler=pathldm_scheduler(), facts={"text": {"policy": "pad77"}}))


@pytest.fixture
def by_class(parts):
    torch.manual_seed(3)
    embedder = awake(ClassEmbedder(5, WIDTH))
    return quiet(TextPipeline(parts["unet"], parts["vae"], pathldm_scheduler(), class_embedder=embedder))


def latents_of(pipeline, prompt=None, **settings):
    settings = {
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        **settings,
    }
    return pipeline(prompt, **settings).images


class TestCall:
    def test_pictures_in_every_form(self, pipeline):
        pictures = pipeline(PROMPTS, num_inference_steps=2).images
        assert [picture.size for picture in pictures] == [(32, 32)] * 2
        forms = {
            form: pipeline(
                PROMPTS[0],
                num_inference_steps=2,
                output_type=form,
                generator=torch.Generator().manual_seed(0),
                return_dict=False,
            )[0]
            for form in ("np", "pt", "latent")
        }
        assert forms["np"].shape == (1, 32, 32, 3)
        assert np.array_equal(forms["np"], forms["pt"].permute(0, 2, 3, 1).numpy())
        assert 0 <= forms["np"].min() <= forms["np"].max() <= 1
        torch.testing.assert_close(pipeline.codec.decode(forms["latent"]), forms["pt"])

    def test_states_say_what_their_prompts_say(self, pipeline):
        states, empty = pipeline.text(PROMPTS).states, pipeline.text("").states
        given = latents_of(pipeline, text_states=states, negative_text_states=empty)
        assert torch.equal(given, latents_of(pipeline, PROMPTS))

    def test_what_is_said_matters(self, pipeline):
        one, other = latents_of(pipeline, ["a", "b"], latents=torch.ones(2, 3, 8, 8))
        assert not torch.allclose(one, other, atol=1e-3)

    def test_the_empty_prompt_is_what_guidance_moves_away_from(self, pipeline):
        assert torch.equal(latents_of(pipeline, PROMPTS, negative_prompt=""), latents_of(pipeline, PROMPTS))
        other = latents_of(pipeline, PROMPTS, negative_prompt="necrosis")
        assert not torch.allclose(other, latents_of(pipeline, PROMPTS), atol=1e-3)

    def test_no_guidance_is_the_conditional_prediction(self, pipeline):
        """Then a negative prompt has no effect, and neither has the missing text encoder."""
        alone = latents_of(pipeline, PROMPTS, guidance_scale=1.0)
        assert torch.equal(alone, latents_of(pipeline, PROMPTS, guidance_scale=1.0, negative_prompt="x"))
        states = pipeline.text(PROMPTS).states
        bare = quiet(TextPipeline(pipeline.unet, pipeline.vae, pathldm_scheduler()))
        assert torch.equal(latents_of(bare, text_states=states, guidance_scale=1.0), alone)

    def test_nothing_said_is_the_empty_prompt(self, pipeline):
        nothing = latents_of(pipeline, num_images_per_prompt=2)
        torch.testing.assert_close(
            nothing, latents_of(pipeline, ["", ""], guidance_scale=1.0), rtol=1e-4, atol=1e-4
        )

    def test_a_scale_and_a_negative_prompt_per_picture(self, pipeline):
        noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        together = latents_of(
            pipeline,
            PROMPTS,
            negative_prompt=["x", "y"],
            guidance_scale=torch.tensor([1.5, 4.0]),
            latents=noise,
        )
        for row, (negative, scale) in enumerate((("x", 1.5), ("y", 4.0))):
            one = slice(row, row + 1)
            alone = latents_of(
                pipeline, PROMPTS[row], negative_prompt=negative, guidance_scale=scale, latents=noise[one]
            )
            torch.testing.assert_close(together[one], alone, rtol=1e-3, atol=1e-3)

    def test_guidance_in_an_interval(self, pipeline):
        never = latents_of(pipeline, PROMPTS, guidance_interval=(1000, 1000))
        assert torch.equal(never, latents_of(pipeline, PROMPTS, guidance_scale=1.0))
        always = latents_of(pipeline, PROMPTS, guidance_interval=(0, 999))
        assert torch.equal(always, latents_of(pipeline, PROMPTS))

    def test_the_scale_saved_with_the_model_is_used(self, parts, pipeline):
        assert pipeline.usual_guidance_scale == 1.5
        pipeline.facts["guidance_scale"] = 3.0
        assert torch.equal(latents_of(pipeline, PROMPTS), latents_of(pipeline, PROMPTS, guidance_scale=3.0))

    @pytest.mark.parametrize("eta", [None, 1.0])
    def test_a_generator_per_picture_makes_pictures_independent(self, pipeline, eta):
        def made(rows):
            return latents_of(
                pipeline,
                [PROMPTS[row] for row in rows],
                generator=[generator_for(0, row) for row in rows],
                eta=eta,
                fixed_batch=1,
            )

        assert torch.equal(made([0, 1])[1:], made([1]))

    def test_several_pictures_of_one_prompt_stand_side_by_side(self, pipeline):
        noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        settings = {"latents": noise, "negative_prompt": ["x", "y"], "num_images_per_prompt": 2}
        made = latents_of(pipeline, PROMPTS, **settings)
        settings = {"latents": noise, "negative_prompt": ["x", "x", "y", "y"]}
        assert torch.equal(
            made, latents_of(pipeline, [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]], **settings)
        )

    def test_the_callback_sees_and_may_change_every_step(self, pipeline):
        seen = []

        def callback(pipe, step, timestep, tensors):
            assert pipe is pipeline
            seen.append((step, int(timestep)))
            return {"latents": torch.zeros_like(tensors["latents"])} if step == STEPS - 1 else {}

        assert not latents_of(pipeline, "a", callback_on_step_end=callback).any()
        assert seen == [(0, 801), (1, 601), (2, 401), (3, 201), (4, 1)]

    def test_progress_shows_the_steps_that_are_taken(self, pipeline, capsys):
        pipeline.scheduler = make_scheduler("ddim-ldm", schedule=PATHLDM_SCHEDULE)
        pipeline.set_progress_bar_config(disable=False)
        latents_of(pipeline, "a", num_inference_steps=6)
        assert "7/7" in capsys.readouterr().err

    def test_other_sizes_and_their_limits(self, pipeline):
        assert latents_of(pipeline, "a", height=32, width=48).shape == (1, 3, 8, 12)
        with pytest.raises(ModelError, match="36 x 32 pixels: both sides must be multiples of 8"):
            latents_of(pipeline, "a", height=36)

    def test_half_precision(self, parts):
        halves = {"unet": tiny_unet(), "vae": tiny_first_stage(), "text_encoder": tiny_text_tower()}
        pipeline = quiet(
            TextPipeline(
                **{**parts, **halves}, scheduler=pathldm_scheduler(), facts={"text": {"policy": "pad77"}}
            )
        )
        expected = latents_of(pipeline, PROMPTS)
        pipeline.to(torch.bfloat16)
        made = latents_of(pipeline, PROMPTS)
        assert made.dtype == torch.float32
        # seven bits of precision through five guided steps: alike, not equal
        assert torch.corrcoef(torch.stack([made.flatten(), expected.flatten()]))[0, 1] > 0.98
        images = pipeline(PROMPTS, num_inference_steps=2, output_type="pt").images
        assert images.dtype == torch.float32
        assert images.isfinite().all()


class TestPlaces:
    def test_parts_are_brought_to_where_they_compute(self, parts):
        """CPU offload, with the CPU for the accelerator: what is tested is that every part is called up."""
        own = {"unet": tiny_unet(), "vae": tiny_first_stage(), "text_encoder": tiny_text_tower()}
        pipeline = quiet(TextPipeline(**{**parts, **own}, scheduler=pathldm_scheduler()))

        def pictures():
            generator = torch.Generator().manual_seed(0)
            return pipeline(PROMPTS, num_inference_steps=2, generator=generator, output_type="pt").images

        expected, called = pictures(), []
        pipeline.enable_model_cpu_offload(device="cpu")
        for name in own:
            hook = getattr(pipeline, name)._hf_hook

            def called_up(module, *args, _name=name, _pre_forward=hook.pre_forward, **kwargs):
                called.append(_name)
                return _pre_forward(module, *args, **kwargs)

            hook.pre_forward = called_up
        assert torch.equal(pictures(), expected)
        assert list(dict.fromkeys(called)) == ["text_encoder", "unet", "vae"]

    def test_an_autoencoder_that_needs_range_stays_in_float32(self, parts):
        vae = tiny_first_stage(None)
        assert vae.config.force_upcast
        pipeline = quiet(TextPipeline(tiny_unet(), vae, pathldm_scheduler()))
        pipeline.to(torch.float16)
        assert (pipeline.unet.dtype, pipeline.vae.dtype) == (torch.float16, torch.float32)

    @pytest.mark.gpu
    def test_device_moves(self, pipeline):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        assert latents_of(pipeline.to("cuda"), PROMPTS).device.type == "cuda"


class TestClasses:
    def test_a_class_is_its_token(self, by_class):
        tokens = by_class.class_embedder(torch.tensor([2, 0]))
        nothing = by_class.class_embedder(torch.tensor([4]))
        given = latents_of(by_class, text_states=tokens, negative_text_states=nothing)
        assert torch.equal(latents_of(by_class, class_labels=[2, 0]), given)

    def test_nothing_said_is_the_last_class(self, by_class):
        labelled = latents_of(by_class, class_labels=4, guidance_scale=1.0)
        assert torch.equal(latents_of(by_class), labelled)

    def test_classes_and_prompts_are_for_their_own_models(self, by_class, pipeline):
        with pytest.raises(ModelError, match="takes prompts, not classes"):
            latents_of(pipeline, class_labels=[1])
        with pytest.raises(ModelError, match="no text encoder with its tokenizer"):
            latents_of(by_class, "a")
        with pytest.raises(ModelError, match="the model knows 0 to 4"):
            latents_of(by_class, class_labels=[5])


class TestFolders:
    def test_a_saved_pipeline_makes_the_same_pictures(self, pipeline, tmp_path):
        pipeline.facts["mpp"] = 1.0
        pipeline.save_pretrained(tmp_path)
        again = quiet(TextPipeline.from_pretrained(tmp_path))
        assert again.facts == pipeline.facts
        assert torch.equal(latents_of(again, PROMPTS), latents_of(pipeline, PROMPTS))
        again.save_pretrained(tmp_path / "again")
        for file in tmp_path.glob("*/*.safetensors"):
            assert (tmp_path / "again" / file.relative_to(tmp_path)).read_bytes() == file.read_bytes()

    def test_a_pipeline_by_class_is_saved_without_text(self, by_class, tmp_path):
        by_class.save_pretrained(tmp_path)
        again = quiet(TextPipeline.from_pretrained(tmp_path))
        assert again.text_encoder is None
        assert torch.equal(latents_of(again, class_labels=[1]), latents_of(by_class, class_labels=[1]))

    def test_another_scheduler_can_be_given(self, pipeline, tmp_path):
        pipeline.save_pretrained(tmp_path)
        scheduler = make_scheduler(schedule=PATHLDM_SCHEDULE)
        assert TextPipeline.from_pretrained(tmp_path, scheduler=scheduler).scheduler is scheduler

    def test_a_folder_with_a_gap_is_refused(self, pipeline, tmp_path):
        pipeline.save_pretrained(tmp_path)
        file = tmp_path / "unet/diffusion_pytorch_model.safetensors"
        state = load_file(file)
        del state["conv_out.bias"]
        save_file(state, file, metadata={"format": "pt"})
        with pytest.raises(WrongWeights, match=r"conv_out\.bias"):
            TextPipeline.from_pretrained(tmp_path)
        file.unlink()
        with pytest.raises(MissingWeights, match="holds no weights"):
            TextPipeline.from_pretrained(tmp_path)

    def test_another_kind_of_pipeline_is_refused(self, pipeline, tmp_path):
        pipeline.save_pretrained(tmp_path)
        index = tmp_path / "model_index.json"
        index.write_text(
            json.dumps({**json.loads(index.read_text()), "_class_name": "StableDiffusionPipeline"})
        )
        with pytest.raises(ModelError, match="describes a StableDiffusionPipeline, not a TextPipeline"):
            TextPipeline.from_pretrained(tmp_path)
        with pytest.raises(MissingWeights, match="is not a pipeline"):
            TextPipeline.from_pretrained(tmp_path / "unet")


class TestWrongInput:
    @pytest.fixture(autouse=True)
    def nothing_is_computed(self, pipeline):
        hook = pipeline.unet.register_forward_pre_hook(lambda *_: pytest.fail("computed"))
        yield
        hook.remove()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"text_states": torch.zeros(2, 77, WIDTH + 1)}, rf"the U-Net takes \(batch, places, {WIDTH}\)"),
            ({"prompt": "a", "text_states": torch.zeros(1, 77, WIDTH)}, "say the same thing"),
            ({"prompt": "a", "negative_prompt": ["x", "y"]}, "2 negative prompts were given for 1"),
            (
                {"prompt": "a", "negative_prompt": "x", "negative_text_states": torch.zeros(1, 77, WIDTH)},
                "say the same thing",
            ),
            (
                {"prompt": "a", "negative_text_states": torch.zeros(1, 154, WIDTH)},
                "prompts have 77 places, negative ones 154",
            ),
            (
                {"text_states": torch.full((1, 77, WIDTH), torch.nan)},
                r"text states of sample\(s\) 0 hold NaN",
            ),
            ({"prompt": "a" * 80}, "need more than the 77 places"),
            ({"prompt": "a", "num_inference_steps": 600}, "begin 600 steps at timestep 600 of 1000"),
            ({"prompt": "a", "num_inference_steps": 0}, "0 sampling steps are not possible"),
            ({"prompt": "a", "num_images_per_prompt": 0}, "0 pictures cannot be made"),
            ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale is nan"),
            ({"prompt": "a", "guidance_interval": (5, 1)}, "from a lower to a higher timestep"),
            ({"prompt": "a", "eta": 2.0}, "eta is 2"),
            ({"prompt": "a", "latents": torch.zeros(2, 3, 8, 8)}, r"these pictures need \(1, 3, 8, 8\)"),
            ({"prompt": "a", "generator": [torch.Generator()] * 2}, "2 generators were given for 1"),
        ],
    )
    def test_it_is_refused_with_the_way_out(self, pipeline, settings, message):
        prompt = settings.get("prompt")
        rest = {name: value for name, value in settings.items() if name != "prompt"}
        with pytest.raises(ModelError, match=message):
            latents_of(pipeline, prompt, **rest)

    @pytest.mark.parametrize(
        "settings",
        [
            {"eta": 2.0},
            {"generator": [torch.Generator()] * 3},
            {"latents": torch.zeros(1, 3, 8, 8)},
            {"guidance_scale": torch.tensor([1.0, 2.0, 3.0])},
        ],
        ids=lambda settings: next(iter(settings)),
    )
    def test_what_is_wrong_is_said_before_prompts_are_encoded(self, pipeline, settings, monkeypatch):
        monkeypatch.setattr(pipeline, "_states", lambda *_: pytest.fail("encoded"))
        with pytest.raises(ModelError):
            latents_of(pipeline, PROMPTS, **settings)

    def test_scales_per_picture_are_as_many_as_pictures(self, pipeline):
        with pytest.raises(ModelError, match="3 guidance scales were given for 2 pictures"):
            latents_of(pipeline, PROMPTS, guidance_scale=torch.tensor([1.0, 2.0, 3.0]))

    def test_programming_errors(self, pipeline):
        with pytest.raises(ValueError, match="output_type 'jpg'"):
            latents_of(pipeline, "a", output_type="jpg")
        with pytest.raises(ValueError, match="a callback can get latents, not noise"):
            latents_of(pipeline, "a", callback_on_step_end_tensor_inputs=["noise"])

    def test_a_scheduler_for_another_target_is_refused(self, pipeline):
        pipeline.scheduler = make_scheduler("ddim", "velocity", PATHLDM_SCHEDULE)
        with pytest.raises(
            ModelError, match="predicts the noise, and its DDIMScheduler takes that for the velocity"
        ):
            latents_of(pipeline, "a")


class TestParts:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                lambda: {"text_encoder": tiny_text_tower(hidden_size=32)},
                "makes states 32 wide, the U-Net takes 16",
            ),
            (lambda: {"tokenizer": None}, "come together; give both or neither"),
            (
                lambda: {"unet": tiny_unet(in_channels=4, out_channels=4)},
                "makes 3 channels, the U-Net turns 4",
            ),
            (lambda: {"facts": {"text": {"policy": "pad77", "length": 90}}}, "policy 'pad77' has 77 places"),
            (lambda: {"class_embedder": ClassEmbedder(5, 8)}, "class embedder makes states 8 wide"),
        ],
        ids=["width", "tokenizer", "channels", "policy", "classes"],
    )
    def test_parts_of_two_models_are_refused(self, parts, changes, message):
        with pytest.raises(ModelError, match=message):
            TextPipeline(**{**parts, "scheduler": pathldm_scheduler(), **changes()})

    def test_a_kl_first_stage_does_as_well(self, parts):
        vae = tiny_first_stage(None)
        made = quiet(TextPipeline(parts["unet"], vae, pathldm_scheduler()))
        states = torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(0))
        images = made(text_states=states, guidance_scale=1.0, num_inference_steps=2, output_type="pt").images
        assert images.shape == (1, 3, 32, 32)


def test_a_unet_without_text_is_refused(parts):
    """Where "no condition" is a text, dropping one leaves nothing to attend to."""
    denoiser, latents = text_denoiser_of(parts["unet"]), torch.zeros(1, 3, 8, 8)
    for conditioning in (
        Conditioning(),
        Conditioning(text_states=torch.zeros(1, 4, WIDTH)).dropped_everywhere(),
    ):
        with pytest.raises(ModelError, match="a U-Net attends to text in every sample"):
            denoiser(latents, torch.tensor(1), conditioning)


def test_a_pipeline_of_the_same_parts_keeps_its_facts(parts):
    facts = {"text": {"policy": "tight"}, "guidance_scale": 3.0}
    pipeline = TextPipeline(**parts, scheduler=pathldm_scheduler(), facts=facts)
    again = TextPipeline.from_pipe(pipeline, scheduler=make_scheduler("ddim-ldm", schedule=PATHLDM_SCHEDULE))
    assert again.facts == facts
    assert again.unet is pipeline.unet
    assert again.scheduler is not pipeline.scheduler
