"""Safe writing and reading of files, and background jobs."""

from guided_diffusion.files.background import Background
from guided_diffusion.files.read import (
    DamagedFile,
    Table,
    expanded,
    marked_text,
    nearest_path,
    read_json,
    read_table,
    read_text,
    require_file,
    set_aside,
    unmarked_text,
)
from guided_diffusion.files.write import (
    CHECKPOINTS_HINT,
    FREE_SPACE_HINT,
    append,
    atomic_write,
    create,
    make_folder,
    remove_leftovers,
    require_replaceable,
    temporary_name,
    writing,
)

__all__ = [
    "CHECKPOINTS_HINT",
    "FREE_SPACE_HINT",
    "Background",
    "DamagedFile",
    "Table",
    "append",
    "atomic_write",
    "create",
    "expanded",
    "make_folder",
    "marked_text",
    "nearest_path",
    "read_json",
    "read_table",
    "read_text",
    "remove_leftovers",
    "require_file",
    "require_replaceable",
    "set_aside",
    "temporary_name",
    "unmarked_text",
    "writing",
]
