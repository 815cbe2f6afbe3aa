// Enums whose enumerators Python knows by name. One list makes both, so that they cannot differ:
//
//   #define AUXK_COLOURS(X) X(Red, red) X(DarkBlue, dark_blue)
//   enum Colour { AUXK_COLOURS(AUXK_ENUMERATOR) kNumColours };    // kRed, kDarkBlue
//   std::vector<std::string> names = {AUXK_COLOURS(AUXK_STRING)};  // "red", "dark_blue"
#pragma once

#define AUXK_ENUMERATOR(symbol, name) k##symbol,
#define AUXK_STRING(symbol, name) #name,
