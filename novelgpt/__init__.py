"""What the pipelines share: settings, text, models, training and scoring. It imports none of them."""
