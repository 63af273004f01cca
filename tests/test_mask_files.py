import numpy as np
import pytest
from made_sources import LEFT, RIGHT, lungs, save
from PIL import Image


@pytest.mark.parametrize("form", ["0/1", "0/255", "labels", "16-bit", "palette", "red", "jpeg"])
def test_mask_files_of_each_kind_say_the_same(form, tmp_path):
    mask = lungs(LEFT, RIGHT)
    grey = mask.astype(np.uint8)
    path = tmp_path / ("m.jpg" if form == "jpeg" else "m.png")
    if form == "palette":  # the picture's colours count, not their numbers: here 0 is white
        image = Image.fromarray(1 - grey)
        image.putpalette([255, 255, 255, 0, 0, 0])
        image.save(path)
    else:
        array = {
            "0/1": grey,
            "0/255": grey * 255,
            "labels": grey + lungs(RIGHT),
            "16-bit": grey.astype(np.uint16) * 4000,
            "red": np.stack([grey * 255, grey * 0, grey * 0], 2),
            "jpeg": grey * 255,
        }[form]
        save(path, array)
    np.testing.assert_array_equal(data.mask_from_file(path, 32, 40), mask)
