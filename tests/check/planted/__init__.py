"""An app with one defect for each code, where a comment says so: ``# planted: WP201``."""
