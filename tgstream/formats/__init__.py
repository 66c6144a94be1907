"""The formats, which encode items as bytes. They use nothing else of tgstream."""
