// tokenizer.h: defines Tokenizer, crc32, tokenizer_open, tokenizer_close, tokenizer_encode,
// tokenizer_text, tokenizer_print.
//
// The file is llama2.c's tokenizer.bin: the length of the longest piece, then for each id its
// score, its length and its bytes.
#ifndef TOKENIZER_H
#define TOKENIZER_H
#include "utils.h"

enum { TOKEN_BOS = 1, TOKEN_EOS = 2, TOKEN_BYTE = 3, TOKEN_PIECE = 259 };  // byte b: TOKEN_BYTE + b

typedef struct {
    int V;                // the number of pieces; 0: there is no tokenizer
    const char **pieces;  // (V) pointers into file; not terminated by zeros
    int *lengths;         // (V)
    float *scores;        // (V)
    char *file;
    uint32_t checksum;    // of the file
} Tokenizer;

// Returns the CRC-32 of n bytes, as zlib and gzip compute it.
static inline uint32_t crc32(const char *bytes, size_t n) {
    uint32_t crc = ~0u;
    for (size_t i = 0; i < n; i++) {
        crc ^= (unsigned char)bytes[i];
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
    }
    return ~crc;
}

// Reads DIR/tokenizer.bin. Returns 0 if there is no such file; exits if it is damaged.
static inline int tokenizer_open(Tokenizer *t, const char *dir) {
    enum { MOST = 65536, LONGEST = 1 << 16 };  // limits: pieces, bytes of a piece
    char path[2048];
    size_t size, at = 4;
    memset(t, 0, sizeof *t);
    snprintf(path, sizeof path, "%s/tokenizer.bin", dir);
    if (access(path, F_OK) != 0 && errno == ENOENT) return 0;
    FILE *file = open_file(path, &size);
    t->file = (char *)allocate(size, 1);
    if (fread(t->file, 1, size, file) != size) die("cannot read %s: %s", path, strerror(errno));
    fclose(file);
    t->checksum = crc32(t->file, size);
    size_t room = size / 8 < MOST ? size / 8 + 1 : (size_t)MOST;
    t->pieces = (const char **)allocate(room, sizeof *t->pieces);
    t->lengths = (int *)allocate(room, sizeof(int));
    t->scores = (float *)allocate(room, sizeof(float));
    for (; at < size && t->V < MOST; t->V++) {
        int *length = &t->lengths[t->V];
        if (size - at < 8) die("%s: piece %d is damaged", path, t->V);
        memcpy(&t->scores[t->V], t->file + at, 4);
        memcpy(length, t->file + at + 4, 4);
        at += 8;
        t->pieces[t->V] = t->file + at;
        if (*length < 0 || *length > LONGEST || (size_t)*length > size - at)
            die("%s: piece %d is damaged", path, t->V);
        at += *length;
    }
    if (t->V < TOKEN_PIECE || at < size)
        die("%s has %s%d pieces, not 259 to 65536: is it in llama2.c's format?", path,
            at < size ? "more than " : "", t->V);
    return 1;
}

static inline void tokenizer_close(Tokenizer *t) {
    free(t->file);
    free(t->pieces);
    free(t->lengths);
    free(t->scores);
}

// Returns the id of the piece that consists of the bytes a followed by the bytes b, or -1.
static inline int tokenizer_find(const Tokenizer *t, const char *a, int a_size, const char *b,
                                 int b_size) {
    for (int id = TOKEN_PIECE; id < t->V; id++)
        if (t->lengths[id] == a_size + b_size && memcmp(t->pieces[id], a, a_size) == 0 &&
            memcmp(t->pieces[id] + a_size, b, b_size) == 0) return id;
    return -1;
}

// Returns the id of token a followed by token b as one piece, or -1.
static inline int tokenizer_join(const Tokenizer *t, int a, int b) {
    if (a < TOKEN_PIECE || b < TOKEN_PIECE) return -1;
    return tokenizer_find(t, t->pieces[a], t->lengths[a], t->pieces[b], t->lengths[b]);
}

// Writes the token of one character (`bytes` long), or, if there is none, the tokens of its bytes.
// Returns the number of tokens written.
static inline int encode_character(const Tokenizer *t, const char *character, int bytes,
                                   int *tokens) {
    int id = tokenizer_find(t, character, bytes, "", 0);
    if (id >= 0) {
        *tokens = id;
        return 1;
    }
    for (int i = 0; i < bytes; i++) tokens[i] = TOKEN_BYTE + (unsigned char)character[i];
    return bytes;
}

// Encodes BOS, a space and the text as sentencepiece does: it starts with single characters, then
// joins the two neighbours whose joint piece has the best score, until no two can be joined. An
// empty text gives BOS alone. tokens has room for strlen(text) + 2; returns how many it wrote.
static inline int tokenizer_encode(const Tokenizer *t, const char *text, int *tokens) {
    int n = 1, best, bytes;
    int *joint = (int *)allocate(strlen(text) + 2, sizeof(int));  // of tokens i and i + 1, or -1
    tokens[0] = TOKEN_BOS;
    if (*text) n += encode_character(t, " ", 1, tokens + n);
    for (; *text; text += bytes) {
        bytes = 1;
        while ((text[bytes] & 0xC0) == 0x80 && bytes < 4) bytes++;  // one UTF-8 character
        n += encode_character(t, text, bytes, tokens + n);
    }
    for (int i = 0; i + 1 < n; i++) joint[i] = tokenizer_join(t, tokens[i], tokens[i + 1]);
    for (;;) {
        best = -1;
        for (int i = 0; i + 1 < n; i++)
            if (joint[i] >= 0 && (best < 0 || t->scores[joint[i]] > t->scores[joint[best]]))
                best = i;
        if (best < 0) break;
        tokens[best] = joint[best];
        n--;
        memmove(tokens + best + 1, tokens + best + 2, (n - best - 1) * sizeof(int));
        memmove(joint + best, joint + best + 1, (n - best - 1) * sizeof(int));
        joint[best - 1] = tokenizer_join(t, tokens[best - 1], tokens[best]);
        if (best + 1 < n) joint[best] = tokenizer_join(t, tokens[best], tokens[best + 1]);
    }
    free(joint);
    return n;
}

// Returns the text of a token and writes its length to *length: 0 for BOS and EOS. The space with
// which a story begins, after BOS, is left out. byte: room for the text of a token of one byte.
static inline const char *tokenizer_text(const Tokenizer *t, int previous, int token, char *byte,
                                         int *length) {
    const char *text = token < TOKEN_PIECE ? byte : t->pieces[token];
    *byte = (char)(token - TOKEN_BYTE);
    *length = token < TOKEN_BYTE ? 0 : token < TOKEN_PIECE ? 1 : t->lengths[token];
    int skip = previous == TOKEN_BOS && *length && *text == ' ';
    *length -= skip;
    return text + skip;
}

// Writes a token's text to file, without the bytes that control a terminal.
static inline void tokenizer_print(const Tokenizer *t, int previous, int token, FILE *file) {
    char byte;
    int length;
    const char *text = tokenizer_text(t, previous, token, &byte, &length);
    for (int i = 0; i < length; i++)
        if (text[i] == '\n' || text[i] == '\t' || ((unsigned char)text[i] >= ' ' && text[i] != 127))
            fputc(text[i], file);
}
#endif
