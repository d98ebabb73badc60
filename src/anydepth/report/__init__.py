"""Pictures and pages out of result documents; nothing is measured here."""
