/* Included before every file of llama.cpp when it is compiled as a peer.

   GCC 12 does not tell its optimizer that ldtilecfg and tileloadd read memory: it drops the stores that fill the tile
   configuration, and the program dies at the first AMX product. Each of these is given a barrier here. */
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define COLDPRESS_READS(address) __asm__ volatile("" : : "r"(address) : "memory")
#define _tile_loadconfig(config) do { COLDPRESS_READS(config); (_tile_loadconfig)(config); } while (0)
#undef _tile_loadd
#define _tile_loadd(tile, base, stride) \
    do { COLDPRESS_READS(base); _tile_loadd_internal(tile, base, stride); } while (0)
#undef _tile_stream_loadd
#define _tile_stream_loadd(tile, base, stride) \
    do { COLDPRESS_READS(base); _tile_stream_loadd_internal(tile, base, stride); } while (0)
#endif
