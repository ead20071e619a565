"""Between two embeddings lies an arc: direction and length each go at constant speed."""

import math

import pytest
import torch

from pixcell.diffusion.embeddings import lerp, mix, path, slerp
from pixcell.errors import ModelError


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def angle(one, other):
    cosine = (one * other).sum(-1) / one.norm(dim=-1) / other.norm(dim=-1)
    return torch.acos(cosine.clamp(-1, 1))


class TestArc:
    def test_it_begins_and_ends_where_it_is_said_to(self):
        start, end = random(4, 4, 24), 3 * random(4, 4, 24, seed=1)
        torch.testing.assert_close(slerp(start, end, 0.0), start)
        torch.testing.assert_close(slerp(start, end, 1.0), end)

    @pytest.mark.parametrize("weight", [0.1, 0.25, 0.5, 0.9])
    def test_direction_and_length_go_at_constant_speed(self, weight):
        start, end = random(5, 24), 3 * random(5, 24, seed=1)
        point = slerp(start, end, weight)
        torch.testing.assert_close(angle(start, point), weight * angle(start, end))
        torch.testing.assert_close(
            point.norm(dim=-1), (1 - weight) * start.norm(dim=-1) + weight * end.norm(dim=-1)
        )

    def test_there_and_back_is_the_same_way(self):
        start, end = random(3, 8), random(3, 8, seed=1)
        torch.testing.assert_close(slerp(start, end, 0.3), slerp(end, start, 0.7))

    def test_along_one_direction_it_is_the_straight_line(self):
        start = random(3, 8)
        for end in (4 * start, start * (1 + 1e-9)):
            torch.testing.assert_close(slerp(start, end, 0.3), lerp(start, end, 0.3))

    def test_just_before_it_is_straight_it_is_nearly_straight(self):
        """The two formulas meet: no jump where one takes over."""
        start, aside = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
        for small in (0.9e-4, 1.1e-4):
            end = math.cos(small) * start + math.sin(small) * aside
            exact = math.cos(0.3 * small) * start + math.sin(0.3 * small) * aside
            torch.testing.assert_close(slerp(start, end, 0.3), exact, rtol=0, atol=1e-8)

    def test_every_vector_has_its_own_weight(self):
        start, end, weights = random(2, 3, 8), random(2, 3, 8, seed=1), torch.rand(2, 3).double()
        together = slerp(start, end, weights)
        for i in range(2):
            for j in range(3):
                one = slerp(start[i, j], end[i, j], float(weights[i, j]))
                torch.testing.assert_close(together[i, j], one)

    def test_a_zero_vector_has_a_straight_way(self):
        end = random(8)
        torch.testing.assert_close(slerp(torch.zeros(8).double(), end, 0.25), 0.25 * end)

    def test_what_a_store_holds_comes_back_in_its_type_and_is_computed_in_more(self):
        start, end = random(4, 64).half(), random(4, 64, seed=1).half()
        exact = slerp(start.double(), end.double(), 0.5)
        point = slerp(start, end, 0.5)
        assert point.dtype == torch.float16
        torch.testing.assert_close(point.double(), exact, rtol=5e-4, atol=1e-3)

    @pytest.mark.parametrize(
        ("start", "end", "weight", "message"),
        [
            ([1.0, 0.0], [-2.0, 0.0], 0.5, "opposite directions"),
            ([1.0, 0.0], [0.0, 1.0, 0.0], 0.5, "shapes differ"),
            ([1.0, float("nan")], [0.0, 1.0], 0.5, "NaN"),
            ([1.0, 0.0], [0.0, 1.0], 1.5, "0 .start. to 1 .end."),
            ([1.0, 0.0], [0.0, 1.0], float("inf"), "NaN or infinity"),
            ([[1.0, 0.0]], [[0.0, 1.0]], torch.zeros(3), "one for each"),
        ],
    )
    def test_what_has_no_way_between_is_refused(self, start, end, weight, message):
        with pytest.raises(ModelError, match=message):
            slerp(torch.tensor(start), torch.tensor(end), weight)

    def test_a_straight_line_goes_on_beyond_its_ends(self):
        torch.testing.assert_close(lerp(torch.zeros(2), torch.ones(2), 1.5), torch.full((2,), 1.5))


class TestPath:
    def test_it_passes_through_its_stops(self):
        stops = random(4, 2, 2, 8)
        way = path(stops, 10)
        assert way.shape == (10, 2, 2, 8)
        torch.testing.assert_close(way[::3], stops)

    @pytest.mark.parametrize(("spherical", "between"), [(True, slerp), (False, lerp)])
    def test_two_stops_are_one_stretch(self, spherical, between):
        stops = random(2, 3, 8)
        for place, point in enumerate(path(stops, 6, spherical=spherical)):
            torch.testing.assert_close(point, between(stops[0], stops[1], place / 5))

    @pytest.mark.parametrize(("stops", "num"), [(1, 5), (3, 1)])
    def test_too_few_stops_or_points_are_refused(self, stops, num):
        with pytest.raises(ModelError, match="at least 2"):
            path(random(stops, 8), num)


class TestMixture:
    def test_of_two_it_is_the_arc(self):
        pair = random(2, 3, 3, 16)
        mixed = mix(pair, torch.tensor([0.3, 0.7], dtype=torch.float64))
        torch.testing.assert_close(mixed, slerp(pair[0], pair[1], 0.7), rtol=1e-9, atol=1e-9)

    def test_of_one_it_is_that_one(self):
        torch.testing.assert_close(mix(random(1, 5)), random(1, 5)[0])

    def test_of_equal_rights_it_lies_in_the_middle(self):
        mixed = mix(2 * torch.eye(3))
        torch.testing.assert_close(mixed, torch.full((3,), 2 / math.sqrt(3)))

    def test_it_has_the_smallest_sum_of_squared_angles(self):
        points, weights = random(5, 4).abs(), torch.tensor([1.0, 2.0, 0.5, 1.0, 0.1]).double()

        def cost(direction):
            return float((weights * angle(points, direction.expand(5, 4)).square()).sum())

        best = mix(points, weights)
        for seed in range(20):
            assert cost(best + 1e-3 * random(4, seed=seed)) > cost(best)

    def test_order_and_scale_of_weights_do_not_matter_and_zero_is_absent(self):
        points, weights = random(4, 2, 6), torch.tensor([0.4, 0.1, 0.0, 0.5], dtype=torch.float64)
        one = mix(points, weights)
        torch.testing.assert_close(mix(points.flip(0), 10 * weights.flip(0)), one)
        torch.testing.assert_close(mix(points[[0, 1, 3]], weights[[0, 1, 3]]), one)

    def test_a_zero_vector_pulls_at_the_length_only(self):
        point = random(6)
        mixed = mix(torch.stack([point, torch.zeros(6).double()]), torch.tensor([0.25, 0.75]))
        torch.testing.assert_close(mixed, 0.25 * point)

    def test_the_plain_mean_is_shorter_than_what_it_is_made_of(self):
        points = random(20, 256)
        plain, spherical = mix(points, spherical=False), mix(points)
        torch.testing.assert_close(plain, points.mean(0))
        assert plain.norm() < 0.3 * points.norm(dim=-1).mean()
        torch.testing.assert_close(spherical.norm(), points.norm(dim=-1).mean())

    @pytest.mark.parametrize(
        ("points", "weights", "message"),
        [
            ([[1.0, 0.0]], [-1.0], "0 or more"),
            ([[1.0, 0.0]], [0.0], "not all 0"),
            ([[1.0, 0.0]], [0.5, 0.5], "1 embeddings were given with"),
            ([[1.0, float("inf")]], [1.0], "NaN or infinity"),
            ([[1.0, 0.0], [-1.0, 0.0]], [0.5, 0.5], "directions of these embeddings cancel"),
        ],
    )
    def test_what_cannot_be_mixed_is_refused(self, points, weights, message):
        with pytest.raises(ModelError, match=message):
            mix(torch.tensor(points), torch.tensor(weights))

    def test_nothing_cannot_be_mixed(self):
        with pytest.raises(ModelError, match="nothing to mix"):
            mix(torch.zeros(0, 4))
