"""Pictures of a pool of pages: an SVG (``page_map``), or an HTML ``animation``."""

from jaxpaged.pictures.animation import draw_page_map_animation
from jaxpaged.pictures.page_map import PageMap, draw_page_map

__all__ = ["PageMap", "draw_page_map", "draw_page_map_animation"]
