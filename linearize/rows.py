"""Some rows of a buffer of static shape, by their indices, or all of it (None): reading and writing in place."""


def take(buffer, rows):
    """buffer [B, ...], rows [n] int64 or None -> [n, ...]; all rows are the buffer itself."""
    return buffer if rows is None else buffer.index_select(0, rows)


def put(buffer, rows, new) -> None:
    """Writes new [n, ...] into these rows of a buffer."""
    if rows is None:
        buffer.copy_(new)
    else:
        buffer.index_copy_(0, rows, new)
