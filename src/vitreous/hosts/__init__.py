"""What timm's models look like inside; the only folder that knows their attribute names."""
