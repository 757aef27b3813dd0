"""Import profiles that other tools measured, with an account of every row that was read."""

from profiles.importing.formats import FORMATS, Format, import_profiles
from profiles.importing.ledger import Imported, ImportOptions, Rejected

__all__ = ["import_profiles", "Imported", "ImportOptions", "Rejected", "FORMATS", "Format"]
