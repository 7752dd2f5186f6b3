"""The demo: a small trained model compressed four ways, its corpus and its report."""
