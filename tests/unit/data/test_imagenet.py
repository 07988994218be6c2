"""ImageNet: from JPEG files to shards, from shards to batches, and what is said of files that cannot be used."""

import errno
import json
import pickle
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from mpi4py import MPI
from PIL import Image, ImageEnhance

from benchmarks import imagenet_pipeline
from hpcavg import tasks
from hpcavg.config.options import Config
from hpcavg.data import class_folders, gratings, imagenet, shards
from hpcavg.data import photo_augmentation as augmentation
from hpcavg.errors import InputError
from hpcavg.tasks.imagenet import Photos
from hpcavg.utils import files

SIZE, CROP = 32, 28  # 32 = 28 * 256/224: test images need no second resizing
CLASSES = [f"n{label:08d}" for label in range(1, 5)]
TRAIN, VAL = 32, 8


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagenet")
    gratings.synthesize(folder, TRAIN / gratings.NUM_TRAIN, seed=3)
    return folder


@pytest.fixture(scope="session")
def prepared(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "prepared"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imagenet, "IMAGES_PER_SHARD", 12)
        imagenet.prepare(source, folder, SIZE, MPI.COMM_SELF)
    return folder


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_close(found, expected):
    np.testing.assert_allclose(found.numpy(), np.asarray(expected), rtol=1e-5, atol=1e-6)


def error_of(call, *arguments):
    with pytest.raises(InputError) as caught:
        call(*arguments)
    return caught.value.as_option()


# -- made-up sets -------------------------------------------------------------------------------------------------


def test_sizes_of_made_up_sets():
    assert gratings.counts(1.0)[0].count(1281) == 833
    assert list(map(sum, gratings.counts(1.0))) == [1_281_167, 50_000]
    train, val = gratings.counts(0.1)
    assert (len(train), sum(train), sum(val)) == (1000, 128_117, 5000)
    assert gratings.counts(0.001) == ([8] * 159 + [9], [2] * 160)
    assert gratings.counts(1e-9) == ([8, 8], [2, 2])


def test_made_up_sets_are_photographs_in_class_folders(source, tmp_path):
    classes, found = class_folders.find(source)
    assert classes == CLASSES
    assert [len(found[part]) for part in shards.PARTS] == [TRAIN, VAL]
    sizes = set()
    for file in found["train"]:
        with Image.open(source / file.path) as image:
            assert image.format == "JPEG"
            sizes.add(image.size)
    assert len(sizes) == TRAIN
    assert any(width < height for width, height in sizes)
    assert "--data-dir" in error_of(gratings.synthesize, source, 1e-9, 0)
    assert "--scale 0: must be a number above 0" in error_of(gratings.synthesize, tmp_path, 0, 0)


# -- preparing ----------------------------------------------------------------------------------------------------


def test_shards_hold_what_a_decoder_finds(source, prepared):
    data = tasks.load_data(tasks.load(Config(task="imagenet", data_dir=str(prepared))))
    names = [
        f"{name}.{kind}" for name in (*(f"train-0000{i}" for i in range(3)), "val-00000") for kind in ("bin", "json")
    ]
    assert sorted(contents(prepared)) == sorted(["meta.json", "train.npy", "val.npy", *names])
    for part, inputs, targets in (("train", *data[:2]), ("val", *data[2:])):
        files_of = class_folders.find(source)[1][part]
        order = np.random.default_rng(imagenet._SHUFFLE_SEED).permutation(len(files_of))
        assert targets.dtype == np.int64
        assert targets.tolist() == [files_of[i].label for i in order]
        for i, pixels in zip(order, inputs[np.arange(len(inputs))], strict=True):
            with Image.open(source / files_of[i].path) as image:
                width, height = image.size
                factor = SIZE / min(width, height)
                expected = image.resize((round(width * factor), round(height * factor)), Image.Resampling.BILINEAR)
            assert min(pixels.shape[:2]) == SIZE
            assert pixels.shape == (expected.height, expected.width, 3)
            # Decoding at a quarter of the resolution, as is done, is not quite the same.
            assert np.abs(pixels.astype(int) - np.array(expected)).mean() < 1.5
    with pytest.raises(ValueError, match="read-only"):
        data.train_inputs[np.array([0])][0][0, 0, 0] = 1


def test_samples_are_small_to_pickle(prepared):
    photos = Photos(prepared, "train")
    index = np.array([5, 31, 0, 5])
    before = photos[index]
    sent = pickle.dumps(photos)
    assert len(sent) < 500
    after = pickle.loads(sent)
    assert len(after) == TRAIN
    assert all(np.array_equal(a, b) for a, b in zip(before, after[index], strict=True))


def test_an_interrupted_run_is_finished_by_the_next(source, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet, "IMAGES_PER_SHARD", 12)
    decode, decoded = class_folders.decode, []

    def killed(path, size):
        decoded.append(path)
        if len(decoded) > 17:
            raise RuntimeError("killed")
        return decode(path, size)

    monkeypatch.setattr(class_folders, "decode", killed)
    with pytest.raises(RuntimeError):
        imagenet.prepare(source, tmp_path, SIZE, MPI.COMM_SELF)
    assert sorted(contents(tmp_path)) == [
        "meta.json",
        "train-00000.bin",
        "train-00000.json",
        "train-00001.bin.partial",
    ]
    assert "start `python -m hpcavg data prepare imagenet` again" in error_of(shards.check, tmp_path)
    assert "size 32, not 16" in error_of(imagenet.prepare, source, tmp_path, 16, MPI.COMM_SELF)
    del decoded[:]
    monkeypatch.setattr(class_folders, "decode", lambda path, size: (decoded.append(path), decode(path, size))[1])
    imagenet.prepare(source, tmp_path, SIZE, MPI.COMM_SELF)
    assert len(decoded) == TRAIN + VAL - 12
    assert contents(tmp_path) == contents(prepared)


def test_a_damaged_folder_is_repaired(source, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet, "IMAGES_PER_SHARD", 12)
    shutil.copytree(prepared, tmp_path / "out")
    cut(tmp_path / "out" / "train-00001.bin", 5)
    cut(tmp_path / "out" / "val.npy", 5)
    imagenet.prepare(source, tmp_path / "out", SIZE, MPI.COMM_SELF)
    assert contents(tmp_path / "out") == contents(prepared)
    overwrite_start(tmp_path / "out" / "val-00000.bin")
    assert "begins with" in error_of(imagenet.prepare, source, tmp_path / "out", SIZE, MPI.COMM_SELF)
    (tmp_path / "out" / "val-00000.bin").unlink()
    imagenet.prepare(source, tmp_path / "out", SIZE, MPI.COMM_SELF)
    assert contents(tmp_path / "out") == contents(prepared)


def test_a_check_names_every_damaged_file(prepared, tmp_path, capsys):
    imagenet.check(str(prepared.parent), MPI.COMM_SELF)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{n} of 4 shards read" for n in (1, 2, 3, 4)] + [f"{prepared}: every file is whole"]
    folder = tmp_path / "prepared"
    shutil.copytree(prepared, folder)
    shard = bytearray((folder / "train-00001.bin").read_bytes())
    shard[5000] ^= 1  # a pixel, which only the checksum tells
    (folder / "train-00001.bin").write_bytes(shard)
    shards.check(folder)
    cut(folder / "train-00002.bin", 5)
    (folder / "val-00000.bin").unlink()
    rewrite_index(folder, "label", 4)
    said = error_of(imagenet.check, str(folder), MPI.COMM_SELF)
    assert said.startswith(f"--data-dir {folder}: must be whole; 4 of its 6 files are damaged: remove them and start")
    damaged = capsys.readouterr().out.splitlines()[4:]
    assert damaged[0] == f"{folder}/train-00001.bin is damaged: its checksum is another"
    assert re.fullmatch(rf"{folder}/train-00002.bin has \d+ bytes and was written with \d+", damaged[1])
    assert damaged[2].startswith(f"{folder}/train.npy must be an index with labels of 4 classes")
    assert damaged[3:] == [f"{folder}/val-00000.bin: No such file or directory"]
    assert "must be a folder with meta.json" in error_of(imagenet.check, str(tmp_path / "none"), MPI.COMM_SELF)


def test_a_finished_folder_is_left_alone(source, prepared, capsys, monkeypatch):
    monkeypatch.setattr(imagenet, "IMAGES_PER_SHARD", 12)
    before = contents(prepared)
    imagenet.prepare(source, prepared, SIZE, MPI.COMM_SELF)
    assert capsys.readouterr().out == f"{prepared} holds these images already\n"
    assert contents(prepared) == before
    monkeypatch.setattr(imagenet, "IMAGES_PER_SHARD", 13)
    assert "other images per shard" in error_of(imagenet.prepare, source, prepared, SIZE, MPI.COMM_SELF)


def png_of(width, height):
    """Return a PNG file that claims this size and holds nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def test_damaged_images_are_left_out_and_reported(source, tmp_path, capsys):
    shutil.copytree(source, tmp_path / "set")
    folder = tmp_path / "set" / "train" / CLASSES[0]
    whole = sorted(folder.iterdir())
    data = whole[0].read_bytes()
    picture = Image.open(whole[1])
    damaged = {
        "cut.JPEG": data[: len(data) // 2],
        "empty.jpg": b"",
        "text.jpeg": b"not an image",
        "bomb.JPEG": png_of(30_000, 30_000),
        "hollow.JPEG": png_of(40, 40),
    }
    for name, content in damaged.items():
        (folder / name).write_bytes(content)
    Image.new("RGB", (3000, 20)).save(folder / "narrow.JPEG")
    picture.convert("CMYK").save(folder / "cmyk.JPEG")
    picture.convert("L").save(folder / "grey.JPG")
    picture.save(folder / "png.JPEG", "PNG")
    (folder / "notes.txt").write_text("ignored")
    imagenet.prepare(tmp_path / "set", tmp_path / "out", SIZE, MPI.COMM_SELF)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"{TRAIN + 3} training and {VAL} validation images of 4 classes, ")
    assert "; left out 6 damaged: train/" in said
    assert said.endswith("and others, all in meta.json")
    skipped = json.loads((tmp_path / "out" / "meta.json").read_text())["parts"]["train"]["skipped"]
    reasons = {skip["path"].rpartition("/")[2]: skip["reason"] for skip in skipped}
    assert set(reasons) == {*damaged, "narrow.JPEG"}
    assert "truncated" in reasons["cut.JPEG"]
    assert reasons["empty.jpg"] == reasons["text.jpeg"] == "no JPEG file"
    assert "decompression bomb" in reasons["bomb.JPEG"]
    assert reasons["narrow.JPEG"] == "3000x20 pixels, one side more than 32 times the other"
    assert np.bincount(tasks.imagenet.load_data(tmp_path / "out").train_targets).tolist() == [11, 8, 8, 8]


def test_grey_and_other_kinds_keep_their_colours(source):
    path = next((source / "train" / CLASSES[0]).iterdir())
    with Image.open(path) as image:
        grey, cmyk = path.with_suffix(".grey"), path.with_suffix(".cmyk")
        image.convert("L").save(grey, "JPEG")
        image.convert("CMYK").save(cmyk, "JPEG")
    pixels = [np.frombuffer(class_folders.decode(own, SIZE)[2], np.uint8).reshape(-1, 3) for own in (grey, cmyk, path)]
    assert (pixels[0][:, :1] == pixels[0]).all()
    assert np.abs(pixels[1].mean(axis=0) - pixels[2].mean(axis=0)).max() < 3


def no_train(folder):
    shutil.rmtree(folder / "train")


def no_classes(folder):
    shutil.rmtree(folder / "val")
    (folder / "val").mkdir()


def flat(folder):
    no_classes(folder)
    (folder / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")


def other_classes(folder):
    (folder / "val" / CLASSES[1]).rename(folder / "val" / "n9")


def empty_class(folder):
    shutil.rmtree(folder / "train" / CLASSES[2])
    (folder / "train" / CLASSES[2]).mkdir()


def unreadable(folder):
    (folder / "train" / CLASSES[2] / "gone.JPEG").symlink_to("nowhere")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (shutil.rmtree, "/set: must be a folder with train/CLASS/*.JPEG and val/CLASS/*.JPEG, from https://www.image"),
        (no_train, "/set/train: must be a folder of class folders: No such file"),
        (
            no_classes,
            "/set/val: must be a folder with a folder of JPEG files per class, from https://www.image-net.org",
        ),
        (flat, "its images must be moved into the folders of their classes"),
        (other_classes, "the same classes in train and val; train alone has n00000002 (of 1), val alone has n9 (of 1)"),
        (empty_class, "/set/train/n00000003: must be a folder with at least one file *.JPEG or *.jpg"),
        (unreadable, "/set/train/n00000003/gone.JPEG: must be a file that can be read: No such file"),
    ],
)
def test_a_source_that_cannot_be_used(source, tmp_path, spoil, says):
    shutil.copytree(source, tmp_path / "set")
    spoil(tmp_path / "set")
    said = error_of(imagenet.prepare, tmp_path / "set", tmp_path / "out", SIZE, MPI.COMM_SELF)
    assert said.startswith("--data-dir ")
    assert says in said


def test_a_destination_that_cannot_be_used(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()

    def fill_up(call, *arguments):
        if call.__name__ == "write":
            raise OSError(errno.ENOSPC, "No space left on device")
        return call(*arguments)

    def said(folder, size=SIZE):
        return error_of(imagenet.prepare, source, tmp_path / folder, size, MPI.COMM_SELF)

    assert "--size 8: must be an integer of at least 16" in said("new", 8)
    assert "a folder that can be written: Not a directory" in said("file/below")
    assert "a new or empty folder" in said("")
    monkeypatch.setattr(imagenet, "_free_bytes", lambda folder: 1000)
    assert "room for at least 0 MB more" in said("small")
    monkeypatch.undo()
    monkeypatch.setattr(files, "perform", fill_up)
    assert f"--output {tmp_path}/full: must be a folder that can be written: No space left" in said("full")


# -- opening ------------------------------------------------------------------------------------------------------


def rewrite_meta(folder, change):
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def rewrite_index(folder, field, value):
    rows = np.load(folder / "train.npy")
    rows[field][3] = value
    np.save(folder / "train.npy", rows)


def cut(path, by):
    path.write_bytes(path.read_bytes()[:-by])


def overwrite_start(path):
    path.write_bytes(b"something else  " + path.read_bytes()[16:])


INDEX = "train.npy: must be an index of what is in the shards"
META = "meta.json: must be a file of hpcavg images, version 1"
DAMAGE = {
    "shard-cut": (lambda f: cut(f / "train-00001.bin", 5), r"train-00001.bin: must be a shard of \d+ bytes, not \d+"),
    "shard-magic": (
        lambda f: overwrite_start(f / "val-00000.bin"),
        "val-00000.bin: must be a shard, which begins with",
    ),
    "shard-gone": (
        lambda f: (f / "train-00002.bin").unlink(),
        r"-00002.bin: must be a shard of \d+ bytes: No such",
    ),
    "index-gone": (lambda f: (f / "val.npy").unlink(), "val.npy: must be a file that can be read: No such file"),
    "index-cut": (lambda f: cut(f / "train.npy", 1), "train.npy: must be a whole NumPy file"),
    "index-other": (lambda f: np.save(f / "val.npy", np.ones(3)), "val.npy: must be rows of shard, offset, height"),
    "index-short": (lambda f: np.save(f / "val.npy", np.load(f / "val.npy")[1:]), "the index of 8 images, not 7"),
    "labels": (lambda f: rewrite_index(f, "label", 4), "labels of 4 classes; it is damaged"),
    "offsets": (lambda f: rewrite_index(f, "offset", 10**9), INDEX),
    "shards": (lambda f: rewrite_index(f, "shard", 3), INDEX),
    "sizes": (lambda f: rewrite_index(f, "width", -1), INDEX),
    "meta-text": (lambda f: (f / "meta.json").write_text("{"), META),
    "meta-list": (lambda f: (f / "meta.json").write_text("[]"), META),
    "meta-version": (lambda f: rewrite_meta(f, lambda m: m.update(version=2)), META),
    "meta-keys": (lambda f: rewrite_meta(f, lambda m: m["parts"].pop("val")), "meta.json: must be whole"),
    "meta-gone": (lambda f: (f / "meta.json").unlink(), "must be a folder with meta.json, or prepared/meta.json, that"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named(prepared, tmp_path, damage):
    spoil, says = DAMAGE[damage]
    shutil.copytree(prepared, tmp_path / "prepared")
    spoil(tmp_path / "prepared")
    config = Config(task="imagenet", data_dir=str(tmp_path / "prepared"))
    said = error_of(lambda: tasks.load_data(tasks.load(config)))
    assert re.fullmatch(f"--data-dir .*{says}.*", said)


def test_a_folder_that_is_not_prepared(source, tmp_path):
    for folder, says in (
        (None, "--data-dir unset: must be the folder that `python -m hpcavg data prepare imagenet --data-dir FOLDER`"),
        (source, f"must be prepared first: run `python -m hpcavg data prepare imagenet --data-dir {source}`"),
        (tmp_path / "none", "none: must be a folder with meta.json"),
    ):
        given = None if folder is None else str(folder)
        assert says in error_of(tasks.load, Config(task="imagenet", data_dir=given))


# -- batches ------------------------------------------------------------------------------------------------------


def smooth(height, width):
    """Return a photograph without sharp edges, in which every pixel is different."""
    down, across = np.mgrid[0:height, 0:width]
    waves = [128 + 100 * np.sin(down / (9 + c) + c) * np.cos(across / (11 - c)) for c in range(3)]
    return np.stack(waves, axis=2).round().astype(np.uint8)


def test_random_boxes_are_within_bounds():
    sizes = [(256, 341), (341, 256), (256, 256), (300, 400)] * 500
    boxes = augmentation.random_boxes(sizes, generator())
    shares = []
    for (height, width), (top, left, box_height, box_width) in zip(sizes, boxes, strict=True):
        assert min(top, left) >= 0
        assert 0 < box_height <= height - top
        assert 0 < box_width <= width - left
        assert 0.73 < box_width / box_height < 1.36  # 3/4 and 4/3, rounded to pixels
        shares.append(box_height * box_width / (height * width))
    assert 0.075 < min(shares) < 0.09
    assert max(shares) > 0.95
    assert 0.3 < np.mean(shares) < 0.54
    assert boxes == augmentation.random_boxes(sizes, generator())
    assert boxes != augmentation.random_boxes(sizes, generator(1))


@pytest.mark.parametrize(
    ("size", "box"), [((30, 900), (0, 430, 30, 40)), ((900, 30), (430, 0, 40, 30)), ((3, 4), (0, 0, 3, 4))]
)
def test_where_no_box_fits_it_is_the_central_one(size, box):
    assert augmentation.central_box(*size) == box
    if max(size) > 100:
        assert augmentation.random_boxes([size], generator()) == [box]


def reference(photo, box, crop, factors, is_flipped):
    """Return what Pillow makes of one photograph."""
    top, left, height, width = box
    image = Image.fromarray(photo).crop((left, top, left + width, top + height))
    image = image.resize((crop, crop), Image.Resampling.BILINEAR)
    for enhance, factor in zip(
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors, strict=True
    ):
        image = enhance(image).enhance(factor)
    if is_flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return (np.array(image) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]


def test_augmentation_is_what_pillow_does_image_by_image():
    photos = [smooth(40 + 3 * i, 70 - 2 * i) for i in range(21)]
    batch = augmentation.augmented(photos, 24, generator(5))
    draws = generator(5)
    boxes = augmentation.random_boxes([photo.shape[:2] for photo in photos], draws)
    factors = 0.6 + 0.8 * torch.rand(3, 21, generator=draws)
    flips = torch.rand(21, generator=draws) < 0.5
    assert 5 < flips.sum() < 16
    assert (batch.shape, batch.dtype, batch.is_contiguous()) == ((21, 3, 24, 24), torch.float32, True)
    for i, photo in enumerate(photos):
        expected = reference(photo, boxes[i], 24, factors[:, i].tolist(), bool(flips[i]))
        difference = np.abs(batch[i].permute(1, 2, 0).numpy() - expected) * 0.225 * 255
        assert difference.max() < 5  # Pillow rounds to bytes four times
        assert difference.mean() < 2
    assert torch.equal(batch, augmentation.augmented(photos, 24, generator(5)))
    assert not torch.equal(batch, augmentation.augmented(photos, 24, generator(6)))


def test_colours_are_jittered_in_this_order_and_clipped():
    crops = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8, generator=generator())
    one = torch.ones(2)

    def jitter(*factors):
        return augmentation.jitter(crops, torch.stack(factors), torch.empty(2, 3, 5, 4))

    plain = crops / 255
    assert_close(jitter(one, one, one), plain)
    assert_close(jitter(one * 1.4, one, one), (plain * 1.4).clamp(max=1))
    grey = (plain * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    assert_close(jitter(one, one, one * 0), grey.expand_as(plain))
    assert_close(jitter(one, one * 0, one), grey.mean((1, 2, 3), keepdim=True).expand_as(plain))
    each = torch.tensor([0.6, 1.4])
    assert_close(jitter(one, one, each)[0], grey[0] + 0.6 * (plain - grey)[0])
    assert jitter(one * 1.4, each, each).max() == 1


def test_test_images_by_hand():
    photo = np.zeros((8, 10, 3), np.uint8)
    photo[:, :, 0] = 20 * np.arange(10)
    photo[:, :, 1] = 30 * np.arange(8)[:, None]
    # 7 * 256/224 = 8: nothing is resized. (8 - 7)/2 and (10 - 7)/2 round to the even 0 and 2.
    batch = augmentation.centred([photo, photo[:, ::-1]], 7)
    assert batch.shape == (2, 3, 7, 7)
    assert_close(batch[0, 0, 3], (20 * np.arange(2, 9) / 255 - 0.485) / 0.229)
    assert_close(batch[0, 1, :, 0], (30 * np.arange(7) / 255 - 0.456) / 0.224)
    assert_close(batch[1, 0, 0], (20 * np.arange(7, 0, -1) / 255 - 0.485) / 0.229)
    assert_close(batch[:, 2], np.full((2, 7, 7), -0.406 / 0.225))
    # 14 * 256/224 = 16: 32 x 41 becomes 16 x 20, of which the crop is 1:15, 3:17.
    big = smooth(32, 41)
    expected = np.array(Image.fromarray(big).resize((20, 16), Image.Resampling.BILINEAR))[1:15, 3:17]
    found = augmentation.centred([big], 14)[0] * augmentation.STD[0] + augmentation.MEAN[0]
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy() * 255, expected, atol=2)


# -- training -----------------------------------------------------------------------------------------------------


def test_the_task_trains_with_and_tests_without_chance(prepared):
    config = Config(task="imagenet", data_dir=str(prepared), crop_size=CROP)
    task = tasks.load(config)
    data = tasks.load_data(task)
    photos = data.train_inputs[np.arange(TRAIN)]
    plain = task.transform(photos, None)
    assert not torch.equal(task.transform(photos, generator()), plain)
    calm = tasks.load(Config(task="imagenet", data_dir=str(prepared.parent), crop_size=CROP, augment=False))
    assert torch.equal(calm.transform(photos, generator()), plain)

    torch.manual_seed(0)
    model = task.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    targets, losses = torch.from_numpy(data.train_targets), []
    for step in range(30):
        loss = task.loss(model(task.transform(photos, generator(step))), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    output = model.eval()(task.transform(data.test_inputs[np.arange(VAL)], None))
    assert task.count_correct(output, torch.from_numpy(data.test_targets)) >= VAL // 2


def test_the_benchmark_compares_with_a_loader_of_jpeg_files(monkeypatch, capsys):
    options = ["--images", "16", "--batch-size", "6", "--crop-size", "28", "--size", "32", "--repeats", "3"]
    monkeypatch.setattr("sys.argv", ["imagenet_pipeline.py", *options])
    imagenet_pipeline.main()
    title, _, *rows = capsys.readouterr().out.rstrip().splitlines()[-8:]
    assert title == "# ImageNet batches of 6 at 28, one core, 16 images a turn"
    assert [re.split("  +", row.strip())[0] for row in rows] == [
        "Pillow, JPEG files",
        "hpcavg",
        "read every byte",
        "crop and resize",
        "hpcavg, cold",
        "hpcavg, test",
    ]
