/* Reads `count` words once, in four independent streams, and gives something that depends on all of them. */
#include <stddef.h>
#include <stdint.h>

uint64_t read_words(const uint64_t *words, size_t count) {
    size_t quarter = count / 4;
    uint64_t a = 0, b = 0, c = 0, d = 0;
    for (size_t i = 0; i < quarter; i++) {
        a ^= words[i];
        b ^= words[i + quarter];
        c ^= words[i + 2 * quarter];
        d ^= words[i + 3 * quarter];
    }
    for (size_t i = 4 * quarter; i < count; i++) a ^= words[i];
    return a ^ b ^ c ^ d;
}
