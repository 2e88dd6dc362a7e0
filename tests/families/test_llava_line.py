"""The LLaVA line: where each token comes from, what is no visual token, pictures of many sizes, videos."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

import foveate
from foveate.engines.verify import verify
from foveate.errors import UnsupportedCall, UnsupportedModel
from foveate.families import Picture, family_of
from foveate.ops import shares
from tests.engine.probes import peek, watch
from tests.families.matrix import METHODS
from tests.zoo.inputs import batch, mixed
from tests.zoo.models import GREEDY, IMAGE, placeholders, tiny, vivid
from tests.zoo.reference import reference_logits

LINE = ("llava", "vipllava", "llava_next", "llava_next_video", "llava_onevision", "video_llava")
TILED = ("llava_next", "llava_next_video", "llava_onevision")
FILMED = ("llava_next_video", "llava_onevision", "video_llava")
NO_PATCH = -777.0  # what the LLM would read of a CLS token

#: Height and width of pictures that make two tiles to four; the second has bars of two patches above and below.
SIZES = ((32, 32), (20, 32), (14, 30), (48, 16))


@cache
def model_of(name: str, impl: str = "sdpa", side: int | None = None, **options: Any) -> Any:
    """A small model, which may read pictures of another size or have other options."""
    if side is None and not options:
        return tiny(name, impl)
    config = copy.deepcopy(model_of(name).config)
    for key, value in options.items():
        setattr(config, key, value)
    if side is not None:
        config.vision_config.image_size = side
        config.image_grid_pinpoints = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [4 * side, 4 * side]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return vivid(AutoModelForImageTextToText.from_config(config, attn_implementation=impl).eval())


@cache
def pixtral(impl: str = "sdpa") -> Any:
    """LLaVA with the tower of the small mistral3, whose patches are not merged here."""
    tower, text = model_of("mistral3").config.vision_config, model_of("llava").config.text_config
    config = AutoConfig.for_model(
        "llava",
        vision_config=tower.to_dict(),
        text_config=text.to_dict(),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return vivid(AutoModelForImageTextToText.from_config(config, attn_implementation=impl).eval())


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def photos(*sizes: tuple[int, int], tiles: int = 4) -> dict[str, Tensor]:
    return {"pixel_values": noise(len(sizes), 1 + tiles, 3, 16, 16), "image_sizes": torch.tensor(sizes)}


def prompt(model: Any, **media: Tensor) -> dict[str, Any]:
    """A prompt with each picture's placeholders, and words around them."""
    family, ids = family_of(model), [1, 5, 6]
    for kind in family.modalities:
        if family.media_arguments[kind] in media:
            for picture in pictures(model, kind, media):
                ids += [family.token_id(model, kind)] * len(picture.rows) + [20, 21]
    return {"input_ids": torch.tensor([[*ids, 40, 41, 42]]), **media}


@torch.no_grad()
def pictures(model: Any, kind: str, inputs: Mapping[str, Any]) -> list[Picture]:
    family = family_of(model)
    inputs = {family.former_names.get(name, name): value for name, value in inputs.items()}
    output, _ = family.encode(model, kind, inputs)
    return family.pictures(model, kind, output, inputs)


def _zoo(name: str, video: bool = False) -> Callable[[], tuple[str, Any, Any]]:
    return lambda: ("video" if video else "image", model_of(name), batch(name, (1, 2), video=video))


def _resized(most: int) -> tuple[str, Any, Any]:
    """The largest picture becomes 4 x 4, 5 x 5 or 6 x 6 tokens of 8 x 8 patches; wide ones and high ones too."""
    model = model_of("llava_onevision", vision_aspect_ratio=f"anyres_max_{most}")
    return "image", model, prompt(model, **photos(*SIZES))


def _large() -> tuple[str, Any, Any]:
    """Sixteen tiles are more than the nine that a picture may have as a rule."""
    model = model_of("llava_onevision", side=16)
    return "image", model, prompt(model, **photos((64, 64), (32, 32), (40, 64), tiles=16))


def _odd(name: str, **options: Any) -> tuple[str, Any, Any]:
    """Frames of 5 x 5 patches do not fall into squares of 2 x 2."""
    model = model_of(name, side=20, **options)
    return "video", model, prompt(model, pixel_values_videos=noise(2, 3, 3, 20, 20))


def _pixtral() -> tuple[str, Any, Any]:
    """An encoder that reads all images in one go, each of its own size."""
    media = {"pixel_values": noise(3, 3, 24, 20), "image_sizes": torch.tensor([[24, 20], [16, 20], [8, 8]])}
    return "image", pixtral(), prompt(pixtral(), **media)


#: What is read, by which model, in which call.
CASES: dict[str, Callable[[], tuple[str, Any, Any]]] = {
    **{f"{name} image": _zoo(name) for name in LINE},
    **{f"{name} video": _zoo(name, video=True) for name in FILMED},
    **{f"llava_onevision resized {most}": lambda most=most: _resized(most) for most in (1, 2, 3)},
    "llava_onevision resized": _large,
    **{f"{name} odd": lambda name=name: _odd(name) for name in ("llava_onevision", "llava_next_video")},
    "llava pixtral": _pixtral,
}


# -- where tokens come from


@contextmanager
def patches_say(model: Any, kind: str, values: Tensor) -> Iterator[None]:
    """Let the encoder's feature layer put out a number for each patch, and let the projector pass it on."""
    family = family_of(model)

    def number(module: Any, args: Any, output: Tensor) -> Tensor:
        states = torch.full_like(output, NO_PATCH)
        patches = states[:, 1:] if family.has_cls(model) else states
        patches[:] = values[: patches[..., 0].numel()].view(*patches.shape[:2], 1)
        return states

    def passed(module: Any, args: Any, output: Tensor) -> Tensor:
        return args[0][..., :1].expand_as(output)

    layer = family.encoder_layers(model, kind)[family.feature_layer(model)]
    hooks = [
        layer.register_forward_hook(number, prepend=True),
        model.model.multi_modal_projector.register_forward_hook(passed),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("case", CASES)
def test_evidence_is_that_of_the_patches_under_a_token(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What patches say goes two ways: through the model to the LLM, and through the family to the method."""
    kind, model, inputs = CASES[case]()
    feature = family_of(model).feature_layer(model) + 1
    probe, seen = peek(0, "encoder_fold"), watch(monkeypatch)
    monkeypatch.setattr(type(probe), "encoder_layers", lambda self, n: range(feature, feature + 1))
    monkeypatch.setattr(type(probe), "fold", lambda self, carry, before, after: after[:, 0].clone())
    values = torch.rand(5000, generator=torch.Generator().manual_seed(4)) + 1
    with patches_say(model, kind, values), foveate.compress(model, probe) as handle:
        model.generate(**inputs, max_new_tokens=1)
    assert handle.frame is not None
    found = handle.frame.images
    for evidence, image in zip(seen["peek", 0], found, strict=True):
        read = image.picture.features[:, 0]
        torch.testing.assert_close(evidence.require("encoder_fold"), read, rtol=1e-5, atol=0)
        assert (read >= 1).all()  # of a newline or a CLS token it would be less
    assert len(found) >= 2


@pytest.mark.parametrize("side", [16, 20])
@pytest.mark.parametrize("mode", ["average", "max", "conv"])
@torch.no_grad()
def test_a_patch_changes_the_tokens_over_it(mode: str, side: int) -> None:
    """Whichever way frames are pooled; a patch beside the last whole square changes nothing."""
    model = model_of("llava_next_video", side=side, spatial_pool_mode=mode)
    media = {"pixel_values_videos": noise(1, 2, 3, side, side)}
    n = 2 * (side // 4) ** 2
    base = torch.rand(n, generator=torch.Generator().manual_seed(4))
    with patches_say(model, "video", base):
        (plain,) = pictures(model, "video", media)
    assert plain.patches is not None
    for patch in (0, 3, 7, 12, n // 2 + 5, n - 1):
        with patches_say(model, "video", base.index_fill(0, torch.tensor([patch]), 9.0)):
            (other,) = pictures(model, "video", media)
        moved = (other.rows != plain.rows).any(-1)
        assert torch.equal(moved, (plain.patches == patch).any(-1))


@pytest.mark.parametrize("layer", ["feature", "last"])
@pytest.mark.parametrize("case", ["llava_next image", "llava_onevision resized 2", "llava_onevision odd"])
def test_saliency_is_what_the_encoder_shows(case: str, layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, model, inputs = CASES[case]()
    family, seen = family_of(model), watch(monkeypatch)
    with foveate.compress(model, peek(0, "encoder_saliency", layer=layer)):
        model.generate(**inputs, max_new_tokens=1)
    maps: list[Tensor] = []
    tower = family.tower(model, kind)
    hook = tower.register_forward_pre_hook(lambda module, args: maps.append(args[0]))
    found = pictures(model, kind, inputs)
    hook.remove()
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        attention = tower(maps[0], output_attentions=True).attentions
    tower.set_attn_implementation("sdpa")
    at = attention[family.feature_layer(model) if layer == "feature" else -1].mean(1)
    values = (at[:, 0, 1:] if family.has_cls(model) else at.mean(1)).flatten()
    for evidence, picture in zip(seen["peek", 0], found, strict=True):
        torch.testing.assert_close(evidence.require("encoder_saliency"), picture.evidence(values))


@pytest.mark.parametrize("name", TILED)
def test_tiles_form_one_grid_of_the_picture(name: str) -> None:
    """Patches that say where they are in the whole of all tiles: tokens stand in the same order, without gaps."""
    model = model_of(name)
    media = photos(*SIZES)
    tiles = [(2, 2), (2, 2), (1, 2), (3, 1)]
    where = [torch.zeros(0)]
    for high, wide in tiles:
        place = torch.arange(4 * high)[:, None] * 100 + torch.arange(4 * wide) + 10_000
        where += [torch.arange(16), place.unflatten(0, (high, 4)).unflatten(2, (wide, 4)).transpose(1, 2).flatten()]
    with patches_say(model, "image", torch.cat(where).float()):
        found = pictures(model, "image", media)
    for picture, (high, wide) in zip(found, tiles, strict=True):
        frame, row, column = picture.coordinates.unbind(1)
        said = picture.features[:, 0].long()
        whole = said[frame == 0]
        assert torch.equal(whole, torch.arange(16)) and torch.equal(whole, (4 * row + column)[frame == 0])
        rows, columns = (said[frame == 1] - 10_000) // 100, (said[frame == 1] - 10_000) % 100
        assert (rows - row[frame == 1]).unique().numel() == (columns - column[frame == 1]).unique().numel() == 1
        height, width = (int(place[frame == 1].max()) + 1 for place in (row, column))
        assert height * width == (frame == 1).sum() and height <= 4 * high and width <= 4 * wide
        assert picture.grid == (2, max(4, height), max(4, width))
        assert len(picture.fixed) == height
    assert [len(picture.features) for picture in found] == [16 + 64, 16 + 6 * 8, 16 + 32, 16 + 48]


@pytest.mark.parametrize("case", [f"{name} image" for name in TILED] + ["llava_onevision resized 2"])
def test_a_crop_holds_the_tokens_of_one_forward(case: str) -> None:
    _, model, inputs = CASES[case]()
    for picture in pictures(model, "image", inputs):
        if picture.grid[0] == 1:
            assert picture.crops == () and picture.thumbnail is None and picture.patches is not None
            continue
        assert picture.thumbnail == 0 and picture.crop_order is not None and picture.patches is not None
        assert picture.crops[0] == 16 and torch.equal(picture.crop_order[:16], torch.arange(16))
        assert sum(picture.crops) == len(picture.features) and len(picture.crops) > 1
        forward = picture.patches // 16 - int(picture.patches.min()) // 16
        share = torch.ones(forward.shape) if picture.weights is None else picture.weights
        for number, tokens in enumerate(picture.crop_order.split(list(picture.crops))):
            inside = (share * (forward == number)).sum(1)[tokens]
            assert (inside >= 0.25).all() and (inside == 1).any()
            assert torch.equal(tokens, tokens.sort().values)


def test_several_pictures_of_one_prompt_are_not_tiled() -> None:
    model = model_of("llava_onevision")
    alone, first, second = pictures(model, "image", batch("llava_onevision", (1, 2)))
    assert alone.grid[0] == 2 and first.grid == second.grid == (1, 4, 4)
    assert [len(picture.fixed) for picture in (first, second)] == [1, 1]
    assert first.patches is not None and torch.equal(first.patches[0], 16 * len(alone.crops) + torch.tensor([0]))


def test_vipllava_is_read_in_its_deepest_feature_layer() -> None:
    model = model_of("vipllava")
    assert model.config.vision_feature_layers == [-2, -3, 1]
    assert family_of(model).feature_layer(model) == 2
    single = model_of("vipllava", vision_feature_layers=-3)
    assert family_of(single).feature_layer(single) == 1


# -- what is no visual token


@pytest.mark.parametrize("case", [case for case in CASES if case.split()[0] in {*TILED, "video_llava"}])
def test_what_comes_from_no_patch_stays(case: str) -> None:
    """Newlines, and the CLS tokens of video_llava, reach the LLM whatever leaves, and nothing counts them."""
    kind, model, inputs = CASES[case]()
    entered: list[Tensor] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        entered.append(kwargs["inputs_embeds"].detach())

    hook = model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    found = pictures(model, kind, inputs)
    with foveate.compress(model, "random:keep=2") as handle:
        model.generate(**inputs, max_new_tokens=1)
    hook.remove()
    for image, picture in zip(handle.report.images, found, strict=True):
        assert image.tokens == len(picture.features) == len(picture.rows) - len(picture.fixed)
        assert image.n_kept == image.alive[-1] == 2
        assert picture.patches is None or len(picture.patches) == image.tokens
    fixed, rows = torch.cat([picture.rows[picture.fixed] for picture in found]), entered[0].flatten(0, 1)
    assert bool(len(fixed)) == (
        (kind, case.split()[0]) not in (("image", "video_llava"), ("video", "llava_next_video"))
    )
    for row in fixed.unique(dim=0):
        assert (rows == row).all(-1).sum() == (fixed == row).all(-1).sum()
    assert handle.report.prompt_tokens_after[0] == handle.report.prompt_tokens[0] - sum(
        image.tokens - 2 for image in handle.report.images if image.row == 0
    )


def test_each_frame_of_video_llava_keeps_its_cls() -> None:
    model = model_of("video_llava")
    (picture,) = pictures(model, "video", batch("video_llava", (1,), video=True))
    assert picture.fixed.tolist() == [10 * frame for frame in range(8)]
    assert picture.grid == (8, 3, 3) and picture.crops == (9,) * 8


def test_a_budget_is_for_visual_tokens() -> None:
    model, inputs = model_of("llava_next"), batch("llava_next", (1, 2))
    with foveate.compress(model, "evocut:keep=0.25") as handle:
        model.generate(**inputs, max_new_tokens=1)
    tokens = [len(picture.features) for picture in pictures(model, "image", inputs)]
    assert len(set(tokens)) == 3
    assert [image.n_kept for image in handle.report.images] == [round(n / 4) for n in tokens]


@pytest.mark.parametrize("name", TILED)
def test_evocut_gives_each_crop_its_share(name: str) -> None:
    model, media = model_of(name), photos(*SIZES)
    with foveate.compress(model, "evocut:keep=0.25") as handle:
        model.generate(**prompt(model, **media), max_new_tokens=1)
    for image, picture in zip(handle.report.images, pictures(model, "image", media), strict=True):
        assert picture.crop_order is not None
        crops = [set(tokens.tolist()) for tokens in picture.crop_order.split(list(picture.crops))]
        assert tuple(len(crop & set(image.kept)) for crop in crops) == shares(image.n_kept, picture.crops)


# -- videos


@pytest.mark.parametrize("method", ["evocut", "adav", "todre", "random", "grid"])
@pytest.mark.parametrize("name", FILMED)
def test_each_frame_keeps_as_many(name: str, method: str) -> None:
    model, inputs = model_of(name), mixed(name)
    more = ",exit=none" if method == "todre" else ""
    with foveate.compress(model, f"{method}:keep=2,per=frame{more}") as handle:
        model.generate(**inputs, max_new_tokens=1)
    assert [image.modality for image in handle.report.images] == ["image", "video", "video", "image"]
    for image in handle.report.images:
        frames = 8 if image.modality == "video" else 1
        assert image.grid[0] == frames or image.modality == "image"
        each = image.tokens // frames
        assert [sum(token // each == frame for token in image.kept) for frame in range(frames)] == [2] * frames


@pytest.mark.parametrize("name", FILMED)
def test_keeping_all_of_a_video_is_the_plain_model(name: str) -> None:
    model, inputs = model_of(name), mixed(name)
    settings = {**GREEDY, "max_new_tokens": 3, "suppress_tokens": placeholders(model)}
    plain = model.generate(**inputs, **settings)
    with foveate.compress(model, "evocut:keep=1.0"):
        same = model.generate(**inputs, **settings)
    assert torch.equal(torch.stack(same.logits), torch.stack(plain.logits))


# -- dropped against masked, beyond what the matrix has


@pytest.mark.parametrize("spec", ["evocut:keep=0.3 + v2drop:stages=2@0.5/4@3", "todre:keep=5,exit=0.5,tau=0.9"])
@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@pytest.mark.parametrize("case", [*(f"{name} image" for name in LINE[1:]), *(f"{name} mixed" for name in FILMED)])
def test_beams(case: str, impl: str, spec: str) -> None:
    """Prompts with pictures of several sizes: beams repeat unequal numbers of rows."""
    name, kind = case.split()
    model, inputs = model_of(name, impl), batch(name, (0, 2, 1)) if kind == "image" else mixed(name)
    beams = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True, "max_new_tokens": 4}
    with foveate.compress(model, spec) as handle:
        output = model.generate(**inputs, **{**GREEDY, **beams, "suppress_tokens": placeholders(model)})
    kept = [
        [(site, image.after(site)) for site in sorted({stage.site for stage in image.stages})]
        for image in handle.report.images
    ]
    reference = reference_logits(model, inputs, output.sequences[:, :-1], kept, handle.positions)[:, -4:]
    chosen = reference.log_softmax(-1).gather(2, output.sequences[:, -4:, None])[..., 0]
    torch.testing.assert_close(chosen.mean(1), output.sequences_scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("spec", METHODS)
@pytest.mark.parametrize("name", [*LINE, "pixtral"])
def test_verify_proves_it_on_inputs_of_its_own(name: str, spec: str) -> None:
    found = verify(pixtral() if name == "pixtral" else model_of(name), spec, new_tokens=4)
    assert found.ok and found.effect > 1e-3
    assert found.tokens[1] < found.tokens[0] or "v2drop" in spec


@pytest.mark.parametrize("case", [case for case in CASES if case.split()[1] in ("resized", "odd", "pixtral")])
def test_verify_proves_it_on_given_inputs(case: str) -> None:
    _, model, inputs = CASES[case]()
    for spec in ("adav:keep=0.3", "v2drop:stages=2@0.5/4@0.3"):
        assert verify(model, spec, inputs, new_tokens=4).ok


def test_each_image_of_pixtral_is_judged_alone() -> None:
    _, model, inputs = _pixtral()
    with foveate.compress(model, "evocut:keep=3") as handle:
        model.generate(**inputs, max_new_tokens=1)
        together = [image.scores() for image in handle.report.images]
        for number, scores in enumerate(together):
            media = {name: inputs[name][number : number + 1] for name in ("pixel_values", "image_sizes")}
            model.generate(**prompt(model, **media), max_new_tokens=1)
            assert handle.report.images[0].scores() == pytest.approx(scores, abs=1e-5)


# -- names and refusals


def test_video_llava_takes_pixels_under_either_name() -> None:
    model, inputs = model_of("video_llava"), dict(batch("video_llava", (1, 1)))
    known, other = sorted(("pixel_values", "pixel_values_images"), key=lambda name: name not in inputs)
    settings = {**GREEDY, "max_new_tokens": 2}
    with foveate.compress(model, "random:keep=3") as handle:
        wanted = model.generate(**inputs, **settings)
        again = model.generate(**inputs | {other: inputs.pop(known)}, **settings)
    assert handle.report.calls == 2
    assert torch.equal(torch.stack(again.logits), torch.stack(wanted.logits))


def test_towers_that_are_not_understood_are_refused_by_name() -> None:
    config = copy.deepcopy(model_of("vipllava").config)
    config.vision_config = model_of("llava_onevision").config.vision_config
    with pytest.raises(UnsupportedModel, match=r"vipllava with a siglip_vision_model tower .* clip_vision_model"):
        foveate.compress(AutoModelForImageTextToText.from_config(config), "random:keep=3")
    for name in ("llava_next", "video_llava"):
        with pytest.raises(UnsupportedModel, match="makes the CLS token a visual token"):
            foveate.compress(model_of(name, vision_feature_select_strategy="full"), "random:keep=3")
    with pytest.raises(UnsupportedModel, match="loses the first patch"):
        foveate.compress(model_of("llava_onevision", vision_feature_select_strategy="default"), "random:keep=3")
    config.vision_config = model_of("mistral3").config.vision_config
    with pytest.raises(UnsupportedModel, match="vipllava with a pixtral tower"):
        foveate.compress(AutoModelForImageTextToText.from_config(config), "random:keep=3")


def test_pixtral_without_sizes_is_refused() -> None:
    _, model, inputs = _pixtral()
    with foveate.compress(model, "random:keep=3"), pytest.raises(UnsupportedCall, match="image_sizes"):
        model.generate(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], max_new_tokens=1)
