"""Package saw.image: from a root tree to a bootable, measured golden image."""
