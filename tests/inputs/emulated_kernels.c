/* Runs cases from standard input through the kernels of LEVEL, in an emulator, and writes the highest level that
   the CPU is found to have, and what came of each case. */
#include <stdio.h>

#include "kernels.c"

int main(void) {
    static char x[1 << 20], y[1 << 20];
    int32_t kinds[4]; /* distribution, dtype, out, n */
    struct noise_row row;
    struct mix_row mixed;
    struct term terms[8];
    const int highest = noisytune_level();
    fwrite(&highest, sizeof highest, 1, stdout);
    while (fread(kinds, sizeof kinds, 1, stdin) == 1) {
        const int dtype = kinds[1], out = kinds[2];
        const size_t n = (size_t)kinds[3], size = (size_t)size_of(dtype), out_size = (size_t)size_of(out);
        row = (struct noise_row){.x = x, .y = y, .n = kinds[3]};
        if (fread(&row.first, 8, 1, stdin) + fread(row.stream, 16, 1, stdin) + fread(&row.amplitude, 4, 1, stdin) != 3)
            return 1;
        mixed = (struct mix_row){.x = x, .y = y, .n = kinds[3], .first = row.first, .terms = terms};
        if (fread(&mixed.count, 8, 1, stdin) + fread(&mixed.kept, 8, 1, stdin) != 2 || mixed.count > 8 ||
            fread(terms, sizeof *terms, (size_t)mixed.count, stdin) != (size_t)mixed.count)
            return 1;
        if (n * 8 > sizeof x || fread(x, size, n, stdin) != n) return 1;
        int64_t next = 0;
        AT(noise, LEVEL)(kinds[0], dtype, out, &row, 1, &next, 1);
        fwrite(y, out_size, n, stdout);
        fwrite(&row.unchanged, 8, 2, stdout);
        next = 0;
        AT(mix, LEVEL)(kinds[0], dtype, out, &mixed, 1, &next, 1);
        fwrite(y, out_size, n, stdout);
        fwrite(&mixed.unchanged, 8, 2, stdout);
        struct moments_row sums = {.x = x, .n = kinds[3]};
        next = 0;
        AT(moments, LEVEL)(dtype, &sums, 1, &next, 1);
        fwrite(&sums.pivot, 8, 6, stdout);
        struct summary found;
        AT(summary, LEVEL)(dtype, x, kinds[3], &found);
        fwrite(&found, sizeof found, 1, stdout);
        const int64_t overflowed = AT(convert, LEVEL)(dtype, out, x, y, kinds[3]);
        fwrite(y, out_size, n, stdout);
        fwrite(&overflowed, 8, 1, stdout);
        struct change between;
        AT(change, LEVEL)(dtype, out, x, y, kinds[3], &between);
        for (int i = 0; i < 10; i++)
            if (between.sums[i] != between.sums[i]) between.sums[i] = 0; /* no number: its bits mean nothing */
        fwrite(&between, sizeof between, 1, stdout);
    }
    return 0;
}
