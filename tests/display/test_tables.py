"""Tables as they are printed."""

from ttt_jax.display.tables import Table, table_text


def test_title_and_note_are_not_wrapped_to_a_narrow_table():
    """A note that begins with "error:" is none, but a second line of it looked like one."""
    title, note = "Layers that were adapted", "error: ||B A - dW|| / ||dW|| at rank 4, as stored"
    lines = table_text(Table(title, note, ["n"], [["1"]])).splitlines()
    assert (lines[0], lines[-1]) == (title, note)
    assert len(lines) == 7
