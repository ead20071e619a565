"""The contact sheet shows every picture, whatever it is called."""

import numpy as np
import pytest

from pixcell.tasks.contact_sheet import SheetRow, draw_contact_sheet


@pytest.mark.parametrize("name", ["new\nline.png", "tab\t.png", "日本語.png", "n" * 250])
def test_any_file_name_can_be_a_label(name):
    picture = np.full((32, 32, 3), 200, np.uint8)
    sheet = draw_contact_sheet(f"of {name}", [SheetRow(name, picture, [picture], [name])], side=32)
    plain = draw_contact_sheet("of x", [SheetRow("x", picture, [picture], ["x"])], side=32)
    assert sheet.size == plain.size
