"""Losses of images in whole micronats: against torch's own losses, one architecture and one batch at a time."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from scipy import stats

from poolshare.search.counts import MICRONATS
from poolshare.search.scoring import ImageScores, image_scores, paired
from poolshare.space import Architecture, ConfigError, ModelError, SearchSpace
from poolshare.supernet import SuperNet

SPACE = SearchSpace(depth=4, levels=(16, 9, 4), operators=("avg2d", "kmeans"), max_run=2)
TEXTS = ("16*2 16 9@avg2d", "16 4@kmeans 4 4", "16 16 16 16", "16 9@avg2d 4@avg2d*2")
ARCHITECTURES = [Architecture.parse(text) for text in TEXTS]


@pytest.fixture(scope="module")
def supernet():
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 7}
    return randomise(SuperNet.from_timm("vit_tiny_patch16_224", SPACE, **options)).eval()


def pictures(count=11):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.randint(7, (count,), generator=generator)


def in_batches(size, images, labels):
    return list(zip(images.split(size), labels.split(size), strict=True))


def test_cross_entropy_and_answers_are_torchs(supernet):
    images, labels = pictures()
    found = image_scores(supernet, ARCHITECTURES, in_batches(4, images, labels), loss="loss")
    for row, architecture in enumerate(ARCHITECTURES):
        logits = supernet(images, [architecture])[0].detach()
        wanted = F.cross_entropy(logits.double(), labels, reduction="none").numpy() * MICRONATS
        assert np.abs(found.loss[row] - wanted).max() <= 5  # logits of batches of other sizes differ in their last bits
        assert (found.contributions[row] == (logits.argmax(1) == labels).numpy()).all()


def test_divergence_is_that_of_the_dense_models_answers_and_needs_no_labels(supernet):
    images, labels = pictures()
    found = image_scores(supernet, ARCHITECTURES, in_batches(4, images, torch.full_like(labels, -1)), labelled=False)
    dense = supernet(images, [SPACE[0]])[0].detach().double().softmax(1)
    for row, architecture in enumerate(ARCHITECTURES):
        logits = supernet(images, [architecture])[0].detach()
        answers = logits.double().softmax(1)
        wanted = (dense * (dense / answers).log()).sum(1).numpy() * MICRONATS
        assert np.abs(found.loss[row] - wanted).max() <= 5
        assert (found.contributions[row] == (logits.argmax(1) == dense.argmax(1)).numpy()).all()
    place = TEXTS.index("16 16 16 16")
    assert not found.loss[place].any()
    assert found.contributions[place].all()


def test_with_labels_a_divergence_still_counts_right_answers_by_them(supernet):
    images, labels = pictures()
    found = image_scores(supernet, ARCHITECTURES[:1], in_batches(4, images, labels))
    logits = supernet(images, ARCHITECTURES[:1])[0]
    assert (found.contributions[0] == (logits.argmax(1) == labels).numpy()).all()


def test_sums_are_whole_and_the_same_in_any_order_of_batches(supernet):
    images, labels = pictures()
    batches = in_batches(4, images, labels)
    forwards, backwards = (image_scores(supernet, ARCHITECTURES, part) for part in (batches, batches[::-1]))
    assert forwards.loss.dtype == np.int64
    assert (forwards.loss.sum(1) == backwards.loss.sum(1)).all()
    first, rest = (image_scores(supernet, ARCHITECTURES, part) for part in (batches[:1], batches[1:]))
    joined = first.followed_by(rest)
    assert (joined.loss == forwards.loss).all()
    assert (joined.contributions == forwards.contributions).all()
    assert joined.images == 11


def test_progress_is_the_share_of_batches(supernet):
    shares = []
    image_scores(supernet, ARCHITECTURES, in_batches(4, *pictures()), progress=shares.append)
    assert shares == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1]


def test_the_interval_is_student_t_of_the_pairs():
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 10**6, 40)
    loss = reference + rng.integers(-1000, 3000, 40)
    found = paired(loss, reference)
    expected = stats.ttest_rel(loss / MICRONATS, reference / MICRONATS).confidence_interval(0.95)
    assert found.mean == pytest.approx((loss - reference).mean() / MICRONATS)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert paired(loss[:1], reference[:1])[1:] == (-np.inf, np.inf)


def test_bad_requests_say_what_is_wrong(supernet):
    batches = in_batches(4, *pictures())
    with pytest.raises(ConfigError, match="loss 'l2' is unknown; known are divergence, loss"):
        image_scores(supernet, ARCHITECTURES, batches, loss="l2")
    with pytest.raises(ConfigError, match="a loss needs labels, and these images have none"):
        image_scores(supernet, ARCHITECTURES, batches, loss="loss", labelled=False)
    with pytest.raises(ConfigError, match="there are no images to score on"):
        image_scores(supernet, ARCHITECTURES, [])
    images, labels = pictures(2)
    images[1] = torch.nan
    with pytest.raises(ModelError, match="'16 16 16 16' has outputs that are not numbers"):
        image_scores(supernet, ARCHITECTURES, [(images, labels)])


def test_losses_of_further_images_follow():
    one = ImageScores(np.array([[1, 2]]), np.array([[True, False]]))
    two = ImageScores(np.array([[3]]), np.array([[True]]))
    assert one.followed_by(two).loss.tolist() == [[1, 2, 3]]
    assert one.followed_by(two).contributions.tolist() == [[True, False, True]]
